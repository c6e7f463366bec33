/* x @ weight.T for weights of 8 or 4 bit, for CPUs whose vectors multiply bytes and add (VNNI).
 *
 * Rows are rounded to integers, with a scale for each FOLD inputs of a row: of one byte if x is bfloat16, of three if it
 * is float32. Sums of FOLD products of bytes are exact. They are scaled and added in float32, one after the other, so a
 * row has the same bits whatever rows are beside it.
 *
 * A weight is [panel, word of inputs, COLUMNS], a word being 4 inputs of 8 bit or 8 of 4 bit. Bytes are unsigned, with
 * 128 added, or 8 to those of 4 bit: the sums begin with what that adds, negative.
 */

#include "panels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#define FOLD 64
#define SUMS 16                /* of 32 registers; more, and the compiler moves them to memory */
#define AHEAD 8192             /* bytes from a line to the one that is asked for, if a tile is alone */
#define PIECE_BYTES (64 << 10) /* of a panel, which the second cache keeps while all tiles take it */
#define MAX_DIGITS 3

int can_multiply_low_bit(void) { return 1; }

INLINE int num_digits(enum element e) { return e == FLOAT32 ? 3 : 1; }

/* Inputs that share a scale of their rows. */
INLINE int64_t fold_of(const struct product *p) { return p->group % FOLD && p->group < p->depth ? FOLD / 2 : FOLD; }

INLINE int64_t num_folds(const struct product *p) { return ceil_div(p->depth, fold_of(p)); }

/* Bytes of a packed weight. */
int64_t size_of_low_bit(const struct product *p) {
    return num_panels(p->num_columns) * num_folds(p) * fold_of(p) * p->bits / 8 * COLUMNS;
}

/* Packs a contiguous weight [num_columns, depth] into `p->weight`: int8, or half bytes that stand for 0 to 15. */
void pack_low_bit(const struct product *p, const void *weight, int num_threads) {
    int64_t num_words = num_folds(p) * fold_of(p) * p->bits / 32;
    uint32_t flip = p->bits == 8 ? 0x80808080 : 0;
    pack_words(weight, p->weight, p->num_columns, p->depth * p->bits / 8, num_words, flip, num_threads);
}

/* A tile's inputs of one fold: words [digit, step of 4 inputs, row], then of each row the scale, the scaled sum of
 * inputs, and [digit] what the sums begin with. */
INLINE int64_t fold_words(int digits, int64_t fold) { return digits * fold / 4 + 2 + digits; }

/* Rounds FOLD inputs of a row at most; `steps[digit]` are 16 words of 4 inputs. Writes the scale and the sum. */
INLINE void round_inputs(int digits, int bits, enum element e, const void *x, int64_t first, int64_t count,
                         __m512i *steps, float *scale, float *total, int32_t *start) {
    const float levels = digits == 1 ? 127.0f : 8355000.0f; /* the greatest that the digits -128 to 127 express */
    const __m512i evens_first = _mm512_set4_epi32(0x0f0d0b09, 0x0e0c0a08, 0x07050301, 0x06040200);
    floats parts[4];
    __m512i largest_bits = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        parts[i] = load_some(x, first + i * LANES, first_lanes(count - i * LANES), e);
        largest_bits = _mm512_max_epi32(largest_bits, (__m512i)((ints)parts[i] & 0x7fffffff)); /* a NaN is largest */
    }
    int32_t largest_word = _mm512_reduce_max_epi32(largest_bits);
    float largest;
    __builtin_memcpy(&largest, &largest_word, sizeof largest);
    *scale = largest / levels;
    floats inverse = splat(levels / largest);
    __m128i bytes[MAX_DIGITS][4];
    for (int i = 0; i < 4; i++) {
        __m512i rest = _mm512_cvtps_epi32((__m512)(parts[i] * inverse));
        for (int d = 0; d < digits; d++) {
            bytes[d][i] = _mm512_cvtepi32_epi8(rest);
            rest = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
        }
    }
    float sum = 0;
    for (int d = digits - 1; d >= 0; d--) {
        __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(bytes[d][1], bytes[d][0])),
                                         _mm256_set_m128i(bytes[d][3], bytes[d][2]), 1);
        int32_t own = _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), all));
        sum = sum * 256 + (float)own;
        start[d] = -own * (bits == 8 ? 128 : 8);
        /* A byte of the weight has two neighbours. */
        steps[d] = bits == 8 ? all : _mm512_shuffle_epi8(all, evens_first);
    }
    *total = sum * *scale;
}

INLINE void pack_digits(const struct product *p, int digits, int bits, const void *x, int64_t rows, int32_t *packed) {
    int64_t fold = fold_of(p), steps = fold / 4;
    for (int64_t k = 0; k < p->depth; k += fold, packed += rows * fold_words(digits, fold)) {
        __m512i words[MAX_DIGITS][LANES];
        float *scales = (float *)(packed + digits * steps * rows);
        int32_t *starts = (int32_t *)(scales + 2 * rows);
        int64_t count = p->depth - k < fold ? p->depth - k : fold;
        for (int64_t r = 0; r < LANES; r++) {
            __m512i own[MAX_DIGITS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
            int32_t start[MAX_DIGITS];
            if (r < rows)
                round_inputs(digits, bits, (enum element)p->element, x, r * p->x_stride + k, count, own, scales + r,
                             scales + rows + r, start);
            for (int d = 0; d < digits; d++) {
                words[d][r] = own[d];
                if (r < rows) starts[d * rows + r] = start[d];
            }
        }
        for (int d = 0; d < digits; d++) {
            if (rows == 1) {
                _mm512_mask_storeu_epi32(packed + d * steps, first_lanes(steps), words[d][0]);
                continue;
            }
            transpose(words[d]);
            for (int64_t s = 0; s < steps; s++)
                _mm512_mask_storeu_epi32(packed + (d * steps + s) * rows, first_lanes(rows), words[d][s]);
        }
    }
}

static void pack_tile(const struct product *p, const char *x, int64_t rows, char *packed) {
    int is_float = p->element == FLOAT32;
#define PACK(digits, bits) pack_digits(p, digits, bits, x, rows, (int32_t *)packed)
    if (p->bits == 8)
        is_float ? PACK(3, 8) : PACK(1, 8);
    else
        is_float ? PACK(3, 4) : PACK(1, 4);
#undef PACK
}

/* A piece of a panel and of a tile's rows. */
struct piece {
    const int32_t *x;
    const char *weight, *next;
    const float *scales, *offsets;
    float *sums;
    int64_t fold, num_folds, folds_per_group, first_fold;
    int lines; /* of `next` to ask for with each fold; 0 if no other tile takes the piece */
};

/* Adds products of 4 inputs to each sum, in place: given the intrinsic, gcc 12 moves sums to and fro, and to memory. */
INLINE void add_products(__m512i *sums, __m512i weight, __m512i input) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(weight), "v"(input));
}

/* Adds the products of a piece to the sums of a tile. `rows`, `digits` and `bits` are known to the compiler. */
INLINE void multiply_tile(int rows, int digits, int bits, struct piece a) {
    const __m512i low = _mm512_set1_epi8(15);
    int parts = rows * digits <= 3 ? 2 : 1; /* sums of their own for every other step, as one waits for the last */
    int64_t steps = a.fold / 4;
    int64_t group = a.first_fold / a.folds_per_group, folds_left = a.folds_per_group - a.first_fold % a.folds_per_group;
    int half = rows * digits * COLUMN_VECTORS;
    for (int64_t f = 0; f < a.num_folds; f++) {
        for (int i = 0; i < a.lines; i++, a.next += CACHE_LINE) __builtin_prefetch(a.next, 0, 2);
        const float *row_scales = (const float *)(a.x + digits * steps * rows), *totals = row_scales + rows;
        const int32_t *starts = (const int32_t *)(totals + rows);
        __m512i acc[SUMS];
        for (int d = 0; d < digits; d++)
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < COLUMN_VECTORS; v++) {
                    acc[(d * rows + r) * COLUMN_VECTORS + v] = _mm512_set1_epi32(starts[d * rows + r]);
                    if (parts == 2) acc[half + (d * rows + r) * COLUMN_VECTORS + v] = _mm512_setzero_si512();
                }
        int64_t s = 0;
        do {
            __m512i w[2][COLUMN_VECTORS];
            for (int v = 0; v < COLUMN_VECTORS; v++) {
                w[0][v] = _mm512_load_si512(a.weight + v * VECTOR_BYTES);
                if (bits == 8) {
                    w[1][v] = _mm512_load_si512(a.weight + COLUMNS * 4 + v * VECTOR_BYTES);
                } else {
                    w[1][v] = _mm512_and_si512(_mm512_srli_epi16(w[0][v], 4), low);
                    w[0][v] = _mm512_and_si512(w[0][v], low);
                }
            }
            if (!a.lines && rows * digits > FEW_ROWS)
#pragma GCC unroll 4
                for (int i = 0; i < bits / 2; i++) __builtin_prefetch(a.weight + AHEAD + i * CACHE_LINE, 0, 2);
            a.weight += COLUMNS * bits;
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++)
#pragma GCC unroll 3
                for (int d = 0; d < digits; d++)
#pragma GCC unroll 12
                    for (int r = 0; r < rows; r++) {
                        __m512i input = _mm512_set1_epi32(a.x[(d * steps + s + i) * rows + r]);
                        for (int v = 0; v < COLUMN_VECTORS; v++)
                            add_products(acc + (parts == 2) * i * half + (d * rows + r) * COLUMN_VECTORS + v, w[i][v],
                                         input);
                    }
            s += 2;
        } while (s < steps);
        __asm__("" ::: "memory"); /* else the tile's sums take registers, too, and there are too few */
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < COLUMN_VECTORS; v++) {
                __m512 value = _mm512_setzero_ps();
#pragma GCC unroll 3
                for (int d = digits - 1; d >= 0; d--) {
                    __m512i sum = acc[(d * rows + r) * COLUMN_VECTORS + v];
                    if (parts == 2) sum = _mm512_add_epi32(sum, acc[half + (d * rows + r) * COLUMN_VECTORS + v]);
                    __m512 own = _mm512_cvtepi32_ps(sum);
                    value = d == digits - 1 ? own : _mm512_fmadd_ps(value, _mm512_set1_ps(256), own);
                }
                float *to = a.sums + r * COLUMNS + v * LANES;
                value = _mm512_mul_ps(value, _mm512_load_ps(a.scales + group * COLUMNS + v * LANES));
                _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(row_scales[r]), _mm512_load_ps(to)));
            }
        for (int i = 0; a.offsets && i < rows * COLUMN_VECTORS; i++) {
            float *to = a.sums + i * LANES;
            __m512 offset = _mm512_load_ps(a.offsets + group * COLUMNS + i % COLUMN_VECTORS * LANES);
            __m512 total = _mm512_set1_ps(totals[i / COLUMN_VECTORS]);
            _mm512_store_ps(to, _mm512_fmadd_ps(offset, total, _mm512_load_ps(to)));
        }
        if (--folds_left == 0) group++, folds_left = a.folds_per_group;
        a.x += rows * fold_words(digits, a.fold);
    }
}

#define TILE(rows, digits, bits) \
    case rows: multiply_tile(rows, digits, bits, a); break;
#define TILES_2(digits, bits) TILE(1, digits, bits) TILE(2, digits, bits)
#define TILES_8(digits, bits) \
    TILES_2(digits, bits)     \
    TILE(3, digits, bits) TILE(4, digits, bits) TILE(5, digits, bits) TILE(6, digits, bits) TILE(7, digits, bits) \
    TILE(8, digits, bits)

static void multiply_1x8(int rows, struct piece a) { switch (rows) { TILES_8(1, 8) } }
static void multiply_1x4(int rows, struct piece a) { switch (rows) { TILES_8(1, 4) } }
static void multiply_3x8(int rows, struct piece a) { switch (rows) { TILES_2(3, 8) } }
static void multiply_3x4(int rows, struct piece a) { switch (rows) { TILES_2(3, 4) } }

static void multiply_panel(const struct product *p, int64_t rows, int64_t panel, const char *packed, float *sums) {
    enum element e = (enum element)p->element;
    int digits = num_digits(e);
    int64_t fold = fold_of(p), folds = num_folds(p), tiles = ceil_div(rows, SUMS / COLUMN_VECTORS / digits);
    int64_t fold_bytes = fold * COLUMNS * p->bits / 8, own_groups = ceil_div(p->depth, p->group);
    int64_t row_words = folds * fold_words(digits, fold), piece_folds = PIECE_BYTES / fold_bytes;
    int lines = tiles == 1 ? 0 : (int)ceil_div(fold_bytes / CACHE_LINE, tiles);
    void (*multiply)(int, struct piece) =
        p->bits == 8 ? (digits == 1 ? multiply_1x8 : multiply_3x8) : (digits == 1 ? multiply_1x4 : multiply_3x4);
    for (int64_t i = 0; i < rows * COLUMNS; i++) sums[i] = 0;
    for (int64_t f = 0; f < folds; f += piece_folds) {
        int64_t some = folds - f < piece_folds ? folds - f : piece_folds;
        const char *weight = (const char *)p->weight + (panel * folds + f) * fold_bytes;
        const char *next = weight + some * fold_bytes;
        for (int64_t t = 0; t < tiles; t++, next += some * lines * CACHE_LINE) {
            int64_t first = t * rows / tiles, own = (t + 1) * rows / tiles - first;
            multiply((int)own,
                     (struct piece){(const int32_t *)packed + first * row_words + f * own * fold_words(digits, fold),
                                    weight, next, p->scales + panel * own_groups * COLUMNS,
                                    p->offsets ? p->offsets + panel * own_groups * COLUMNS : NULL,
                                    sums + first * COLUMNS, fold, some, ceil_div(p->group, fold), f, lines});
        }
    }
}

/* As `multiply_rows`, by weights of 8 or 4 bit. */
int multiply_low_bit(const struct product *p, const void *x, const void *residual, int has_gelu, void *out,
                     int num_threads) {
    int digits = num_digits((enum element)p->element);
    struct kernel kernel = {SUMS / COLUMN_VECTORS / digits, num_folds(p) * fold_words(digits, fold_of(p)) * 4, pack_tile,
                            multiply_panel};
    return multiply_rows(p, &kernel, x, residual, has_gelu, out, num_threads);
}

#else

int can_multiply_low_bit(void) { return 0; }

#endif
