/* x @ weight.T in bfloat16 with sums in float32, for CPUs whose vectors multiply pairs of bfloat16.
 *
 * The weight is packed into panels of COLUMNS outputs, [panel, pair of inputs, COLUMNS, 2]: a panel is one stream of
 * memory. The rows are packed into tiles of at most TILE_ROWS, [tile, pair, row, 2]. A tile takes a panel PAIRS pairs
 * at a time, its sums in registers, and meanwhile asks for its share of what the panel's next pairs are, so that
 * memory and arithmetic overlap however few tiles there are.
 *
 * Every sum runs over the pairs one after the other: a row has the same bits whatever rows are beside it.
 */

#include "vectors.h"

/* A CPU with a tile unit (AMX) has a better way, which is oneDNN's. */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)

#include <immintrin.h>

#define COLUMN_VECTORS 2
#define COLUMNS (COLUMN_VECTORS * LANES)
#define TILE_ROWS 12   /* 24 sums, 2 vectors of weights and an input, of 32 registers */
#define BLOCK_ROWS 144 /* 12 tiles */
#define PAIRS 1024   /* 128 KB of weights, which the second cache keeps while all tiles take them */
#define UNROLL 8     /* pairs; the depth is padded to a multiple */
#define LINES_PER_UNROLL (UNROLL * COLUMNS * 4 / CACHE_LINE)

struct product {
    int64_t num_rows, num_columns, depth;
    int64_t x_stride, residual_stride; /* elements between rows */
    const void *weight;                /* as `pack_bfloat16` made it */
    const void *bias;                  /* bfloat16 [num_columns], or NULL */
};

/* The panels of a thread's share that are left. One cache line each: a thread mostly writes to its own. */
struct share {
    int64_t next, end;
    char unused[CACHE_LINE - 16];
};

int can_multiply(void) { return 1; }

INLINE int64_t num_tiles(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

INLINE int64_t num_panels(int64_t num_columns) { return (num_columns + COLUMNS - 1) / COLUMNS; }

INLINE int64_t num_pairs(int64_t depth) { return (depth + 2 * UNROLL - 1) / (2 * UNROLL) * UNROLL; }

INLINE void *allocate(int64_t bytes) {
    return aligned_alloc(VECTOR_BYTES, (size_t)(bytes + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES);
}

/* Elements that `pack_bfloat16` writes. */
int64_t packed_size(int64_t num_columns, int64_t depth) {
    return num_panels(num_columns) * num_pairs(depth) * COLUMNS * 2;
}

/* Packs a contiguous weight [num_columns, depth]. */
void pack_bfloat16(const uint16_t *weight, uint16_t *packed, int64_t num_columns, int64_t depth, int num_threads) {
    int64_t pairs = num_pairs(depth);
#pragma omp parallel for num_threads(num_threads)
    for (int64_t panel = 0; panel < num_panels(num_columns); panel++)
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t i = 0; i < 2 * COLUMNS; i++) {
                int64_t column = panel * COLUMNS + i / 2, d = 2 * pair + i % 2;
                packed[(panel * pairs + pair) * 2 * COLUMNS + i] =
                    column < num_columns && d < depth ? weight[column * depth + d] : 0;
            }
}

/* Adds the products of `pairs` pairs to the sums of a tile; `rows` is known to the compiler. */
INLINE void multiply_tile(int rows, const uint32_t *x, const char *weight, int64_t pairs, int is_first, float *sums,
                          const char *next, int lines) {
    __m512 acc[TILE_ROWS * COLUMN_VECTORS];
    for (int i = 0; i < rows * COLUMN_VECTORS; i++)
        acc[i] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * LANES);
    for (int64_t k = 0; k < pairs; k += UNROLL) {
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

/* Swaps the rows and columns of 16 x 16 words: 2 x 2 blocks of words, then of double words, then of quarters. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            v[i + 4 * j] = _mm512_shuffle_i32x4(t[i + 4 * j], t[i + 8 + 4 * j], 0x88);
            v[i + 4 * j + 8] = _mm512_shuffle_i32x4(t[i + 4 * j], t[i + 8 + 4 * j], 0xdd);
        }
}

/* Packs the rows of a tile, LANES pairs at a time. */
static void pack_tile(const struct product *p, const uint16_t *x, int64_t rows, uint32_t *packed) {
    int64_t pairs = num_pairs(p->depth);
    __mmask16 kept = (__mmask16)((1 << rows) - 1);
    for (int64_t k = 0; k < pairs; k += LANES) {
        int64_t rest = p->depth - 2 * k;
        __mmask32 mask = rest >= 2 * LANES ? 0xffffffff : rest > 0 ? (1u << rest) - 1 : 0;
        __m512i words[LANES];
        for (int r = 0; r < LANES; r++)
            words[r] = r < rows ? _mm512_maskz_loadu_epi16(mask, x + r * p->x_stride + 2 * k) : _mm512_setzero_si512();
        transpose(words);
        for (int i = 0; i < LANES && k + i < pairs; i++)
            _mm512_mask_storeu_epi32(packed + (k + i) * rows, kept, words[i]);
    }
}

/* In its tanh form (Hendrycks & Gimpel 2016), with (1 + tanh(z)) / 2 = 1 / (1 + e^-2z). */
INLINE floats gelu(floats x) {
    floats z2 = x * fused(splat(0.0713548163f) * x, x, splat(1.5957691216f));
    ints is_negative = z2 < splat(0.0f);
    floats e = exponential((floats)((ints)z2 | (int32_t)0x80000000));
    floats upper = (floats)(((ints)(x * e) & is_negative) | ((ints)x & ~is_negative));
    return upper / (splat(1.0f) + e);
}

INLINE floats load_some(const uint16_t *base, __mmask16 mask) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, base)), 16);
}

/* Rounds the sums of a panel into the result, with all that is to be done to them. */
static void finish_panel(const struct product *p, int64_t rows, int64_t panel, const float *sums, const uint16_t *residual,
                         int has_gelu, uint16_t *out) {
    for (int64_t v = 0; v < COLUMN_VECTORS; v++) {
        int64_t column = panel * COLUMNS + v * LANES, rest = p->num_columns - column;
        if (rest <= 0) return;
        __mmask16 mask = rest < LANES ? (__mmask16)((1 << rest) - 1) : (__mmask16)0xffff;
        floats bias = p->bias ? load_some((const uint16_t *)p->bias + column, mask) : splat(0.0f);
        for (int64_t r = 0; r < rows; r++) {
            floats value = (floats)_mm512_load_ps(sums + r * COLUMNS + v * LANES) + bias;
            if (has_gelu) value = gelu(value);
            if (residual) value += load_some(residual + r * p->residual_stride + column, mask);
            __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)value);
            _mm256_mask_storeu_epi16(out + r * p->num_columns + column, mask, rounded);
        }
    }
}

/* Multiplies packed rows by one panel. */
static void multiply_panel(const struct product *p, int64_t rows, int64_t panel, const uint32_t *packed, float *sums) {
    int64_t pairs = num_pairs(p->depth), tiles = num_tiles(rows);
    int lines = (int)((LINES_PER_UNROLL + tiles - 1) / tiles);
    for (int64_t k = 0; k < pairs; k += PAIRS) {
        int64_t some = pairs - k < PAIRS ? pairs - k : PAIRS;
        const char *weight = (const char *)p->weight + (panel * pairs + k) * COLUMNS * 4;
        const char *next = weight + some * COLUMNS * 4;
        for (int64_t t = 0; t < tiles; t++, next += some / UNROLL * lines * CACHE_LINE) {
            int64_t first = t * rows / tiles, own = (t + 1) * rows / tiles - first;
            multiply_any_tile((int)own, packed + first * pairs + k * own, weight, some, k == 0, sums + first * COLUMNS,
                              next, lines);
        }
    }
}

/* Multiplies some rows, few enough that all of them stay in a near cache while the weight passes.
 *
 * Panels are shared out evenly, as a thread that goes through neighbours reads one stream. A thread that is done helps
 * the others: one that the system has taken its core from for a while would keep all waiting. */
static int multiply_block(const struct product *p, int64_t rows, const uint16_t *x, const uint16_t *residual,
                          int has_gelu, uint16_t *out, int num_threads) {
    int64_t pairs = num_pairs(p->depth), tiles = num_tiles(rows), panels = num_panels(p->num_columns);
    int failed = 0;
    struct share *shares = allocate(num_threads * (int64_t)sizeof(struct share));
    uint32_t *packed = allocate(rows * pairs * 4);
    if (shares == NULL || packed == NULL) {
        free(shares), free(packed);
        return 1;
    }
    for (int i = 0; i < num_threads; i++)
        shares[i] = (struct share){i * panels / num_threads, (i + 1) * panels / num_threads, {0}};
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        float *sums = allocate(rows * COLUMNS * 4);
        failed = sums == NULL;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            int64_t first = t * rows / tiles;
            pack_tile(p, x + first * p->x_stride, (t + 1) * rows / tiles - first, packed + first * pairs);
        }
#pragma omp for schedule(static, 1) nowait
        for (int own = 0; own < num_threads; own++)
            for (int i = 0; !failed && i < num_threads; i++) {
                struct share *share = &shares[(own + i) % num_threads];
                int64_t panel;
                while ((panel = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED)) < share->end) {
                    multiply_panel(p, rows, panel, packed, sums);
                    finish_panel(p, rows, panel, sums, residual, has_gelu, out);
                }
            }
        free(sums);
    }
    free(shares), free(packed);
    return failed;
}

/* Writes x [num_rows, depth] times the weight, plus the bias, to `out` [num_rows, num_columns]; then either its GELU,
 * or plus `residual` [num_rows, num_columns] if that is not NULL. Returns 0, or 1 if there was no memory. */
int multiply_bfloat16(const struct product *p, const uint16_t *x, const uint16_t *residual, int has_gelu,
                      uint16_t *out, int num_threads) {
    int64_t blocks = (p->num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t first = b * p->num_rows / blocks, rows = (b + 1) * p->num_rows / blocks - first;
        if (multiply_block(p, rows, x + first * p->x_stride, residual ? residual + first * p->residual_stride : NULL,
                           has_gelu, out + first * p->num_columns, num_threads))
            return 1;
    }
    return 0;
}

#else

int can_multiply(void) { return 0; }

#endif
