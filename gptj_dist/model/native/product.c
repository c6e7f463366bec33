/* x @ weight.T in bfloat16 with sums in float32, for CPUs whose vectors multiply pairs of bfloat16.
 *
 * The weight is packed into panels of COLUMNS outputs, [panel, pair of inputs, COLUMNS, 2]: a panel is one stream of
 * memory. The rows are packed into tiles of at most TILE_ROWS, [tile, pair, row, 2]. A tile takes a panel PAIRS pairs
 * at a time, its sums in registers, and meanwhile asks for its share of what the panel's next pairs are, so that
 * memory and arithmetic overlap however few tiles there are. Many lines at a time are asked for into the second cache
 * only: with the first cache's few slots for them taken, all else would wait.
 *
 * Every sum runs over the pairs one after the other: a row has the same bits whatever rows are beside it.
 */

#include "panels.h"

/* A CPU with a tile unit (AMX) has a better way, which is oneDNN's. */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)

#define TILE_ROWS 12 /* 24 sums, 2 vectors of weights and an input, of 32 registers */
#define PAIRS 1024   /* 128 KB of weights, which the second cache keeps while all tiles take them */
#define UNROLL 8     /* pairs; the depth is padded to a multiple */
#define LINES_PER_UNROLL (UNROLL * COLUMNS * 4 / CACHE_LINE)
#define MANY_LINES (LINES_PER_UNROLL / 2)

int can_multiply_bfloat16(void) { return 1; }

INLINE int64_t num_pairs(int64_t depth) { return ceil_div(depth, 2 * UNROLL) * UNROLL; }

/* Bytes of a packed weight. */
int64_t size_of_bfloat16(const struct product *p) {
    return num_panels(p->num_columns) * num_pairs(p->depth) * COLUMNS * 4;
}

/* Packs a contiguous weight [num_columns, depth] into `p->weight`. */
void pack_bfloat16(const struct product *p, const void *weight, int num_threads) {
    pack_words(weight, p->weight, p->num_columns, 2 * p->depth, num_pairs(p->depth), 0, num_threads);
}

/* Adds the products of `pairs` pairs to the sums of a tile; `rows` is known to the compiler. */
INLINE void multiply_tile(int rows, const uint32_t *x, const char *weight, int64_t pairs, int is_first, float *sums,
                          const char *next, int lines) {
    __m512 acc[TILE_ROWS * COLUMN_VECTORS];
    for (int i = 0; i < rows * COLUMN_VECTORS; i++)
        acc[i] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * LANES);
    for (int64_t k = 0; k < pairs; k += UNROLL) {
        if (rows > FEW_ROWS && lines >= MANY_LINES)
            for (int i = 0; i < lines; i++, next += CACHE_LINE) __builtin_prefetch(next, 0, 2);
        else if (rows > FEW_ROWS)
            for (int i = 0; i < lines; i++, next += CACHE_LINE) __builtin_prefetch(next);
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; u++, x += rows, weight += COLUMNS * 4) {
            __m512bh w[COLUMN_VECTORS];
            for (int v = 0; v < COLUMN_VECTORS; v++)
                w[v] = (__m512bh)_mm512_load_si512(weight + v * VECTOR_BYTES);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                __m512bh input = (__m512bh)_mm512_set1_epi32((int32_t)x[r]);
                for (int v = 0; v < COLUMN_VECTORS; v++)
                    acc[r * COLUMN_VECTORS + v] = _mm512_dpbf16_ps(acc[r * COLUMN_VECTORS + v], input, w[v]);
            }
        }
    }
    for (int i = 0; i < rows * COLUMN_VECTORS; i++) _mm512_store_ps(sums + i * LANES, acc[i]);
}

static void multiply_any_tile(int rows, const uint32_t *x, const char *weight, int64_t pairs, int is_first,
                              float *sums, const char *next, int lines) {
    switch (rows) {
#define CASE(n) \
    case n: multiply_tile(n, x, weight, pairs, is_first, sums, next, lines); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

/* Packs the rows of a tile, LANES pairs at a time. */
static void pack_tile(const struct product *p, const char *x, int64_t rows, char *packed) {
    int64_t pairs = num_pairs(p->depth);
    for (int64_t k = 0; k < pairs; k += LANES) {
        int64_t rest = p->depth - 2 * k;
        __mmask32 mask = rest >= 2 * LANES ? 0xffffffff : rest > 0 ? (1u << rest) - 1 : 0;
        __m512i words[LANES];
        for (int r = 0; r < LANES; r++)
            words[r] = _mm512_maskz_loadu_epi16(r < rows ? mask : 0, (const uint16_t *)x + r * p->x_stride + 2 * k);
        transpose(words);
        for (int i = 0; i < LANES && k + i < pairs; i++)
            _mm512_mask_storeu_epi32((uint32_t *)packed + (k + i) * rows, first_lanes(rows), words[i]);
    }
}

/* Multiplies packed rows by one panel. */
static void multiply_panel(const struct product *p, int64_t rows, int64_t panel, const char *packed, float *sums) {
    int64_t pairs = num_pairs(p->depth), tiles = ceil_div(rows, TILE_ROWS);
    int lines = (int)ceil_div(LINES_PER_UNROLL, tiles);
    for (int64_t k = 0; k < pairs; k += PAIRS) {
        int64_t some = pairs - k < PAIRS ? pairs - k : PAIRS;
        const char *weight = (const char *)p->weight + (panel * pairs + k) * COLUMNS * 4;
        const char *next = weight + some * COLUMNS * 4;
        for (int64_t t = 0; t < tiles; t++, next += some / UNROLL * lines * CACHE_LINE) {
            int64_t first = t * rows / tiles, own = (t + 1) * rows / tiles - first;
            multiply_any_tile((int)own, (const uint32_t *)packed + first * pairs + k * own, weight, some, k == 0,
                              sums + first * COLUMNS, next, lines);
        }
    }
}

/* As `multiply_rows`, in bfloat16. */
int multiply_bfloat16(const struct product *p, const void *x, const void *residual, int has_gelu, void *out,
                      int num_threads) {
    struct kernel kernel = {TILE_ROWS, num_pairs(p->depth) * 4, pack_tile, multiply_panel};
    return multiply_rows(p, &kernel, x, residual, has_gelu, out, num_threads);
}

#else

int can_multiply_bfloat16(void) { return 0; }

#endif
