/* What products with packed weights share: the rows' order, the threads' shares, and what is done to the sums.
 *
 * The weight is packed into panels of COLUMNS outputs: a panel is one stream of memory. The rows are packed into tiles,
 * as even as can be. All tiles take a piece of a panel before the next piece.
 */

#include "vectors.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)

#define COLUMN_VECTORS 2
#define COLUMNS (COLUMN_VECTORS * LANES)
#define BLOCK_ROWS 144 /* 12 tiles of 12 */
#define FEW_ROWS 4     /* of a tile, with which the CPU asks for lines early enough by itself */

struct product {
    int64_t num_rows, num_columns, depth;
    int64_t x_stride, residual_stride; /* elements between rows */
    int64_t element;                   /* `enum element` of x, bias, residual and result */
    int64_t bits, group;               /* of weights in few bits; inputs to a scale */
    void *weight;                      /* packed */
    const void *bias;                  /* [num_columns], or NULL */
    const float *scales, *offsets;     /* [panel, group, COLUMNS], of weights in few bits; offsets may be NULL */
};

/* How one kind of weight is multiplied. */
struct kernel {
    int64_t tile_rows; /* at most */
    int64_t row_bytes; /* of a packed row */
    void (*pack_tile)(const struct product *, const char *x, int64_t rows, char *packed);
    /* Writes the sums [rows, COLUMNS] of a panel. */
    void (*multiply_panel)(const struct product *, int64_t rows, int64_t panel, const char *packed, float *sums);
};

/* The panels of a thread's share that are left. One cache line each: a thread mostly writes to its own. */
struct share {
    int64_t next, end;
    char unused[CACHE_LINE - 16];
};

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE int64_t num_panels(int64_t num_columns) { return ceil_div(num_columns, COLUMNS); }

INLINE void *allocate(int64_t bytes) {
    return aligned_alloc(VECTOR_BYTES, (size_t)(bytes + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES);
}

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? (__mmask16)0xffff : (__mmask16)((1 << (count > 0 ? count : 0)) - 1);
}

INLINE floats load_some(const void *base, int64_t index, __mmask16 mask, enum element e) {
    if (e == FLOAT32) return (floats)_mm512_maskz_loadu_ps(mask, (const float *)base + index);
    __m256i upper = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)base + index);
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16);
}

INLINE void store_some(void *base, int64_t index, floats value, __mmask16 mask, enum element e) {
    if (e == FLOAT32)
        _mm512_mask_storeu_ps((float *)base + index, mask, (__m512)value);
    else
        _mm256_mask_storeu_epi16((uint16_t *)base + index, mask, (__m256i)rounded_halves(value));
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

/* Packs a contiguous weight [num_columns, row_bytes] as [panel, word of 4 bytes, COLUMNS], with zeros at the end of
 * each row. Flips the bits of `flip` in every word. */
static void pack_words(const char *weight, char *packed, int64_t num_columns, int64_t row_bytes, int64_t num_words,
                       uint32_t flip, int num_threads) {
#pragma omp parallel for num_threads(num_threads)
    for (int64_t panel = 0; panel < num_panels(num_columns); panel++)
        for (int64_t word = 0; word < num_words; word += LANES)
            for (int64_t v = 0; v < COLUMN_VECTORS; v++) {
                __m512i words[LANES];
                int64_t rest = row_bytes - 4 * word;
                __mmask64 mask = rest >= VECTOR_BYTES ? ~(__mmask64)0 : rest > 0 ? ((__mmask64)1 << rest) - 1 : 0;
                for (int64_t i = 0; i < LANES; i++) {
                    int64_t column = panel * COLUMNS + v * LANES + i;
                    __m512i own = _mm512_maskz_loadu_epi8(column < num_columns ? mask : 0,
                                                          weight + column * row_bytes + 4 * word);
                    words[i] = _mm512_xor_si512(own, _mm512_set1_epi32((int32_t)flip));
                }
                transpose(words);
                for (int64_t i = 0; i < LANES && word + i < num_words; i++)
                    _mm512_store_si512(packed + ((panel * num_words + word + i) * COLUMNS + v * LANES) * 4, words[i]);
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

/* Rounds the sums of a panel into the result, with all that is to be done to them. */
static void finish_panel(const struct product *p, int64_t first_row, int64_t rows, int64_t panel, const float *sums,
                         const void *residual, int has_gelu, void *out) {
    enum element e = (enum element)p->element;
    for (int64_t v = 0; v < COLUMN_VECTORS; v++) {
        int64_t column = panel * COLUMNS + v * LANES;
        __mmask16 mask = first_lanes(p->num_columns - column);
        if (!mask) return;
        floats bias = p->bias ? load_some(p->bias, column, mask, e) : splat(0.0f);
        for (int64_t r = 0; r < rows; r++) {
            floats value = (floats)_mm512_load_ps(sums + r * COLUMNS + v * LANES) + bias;
            if (has_gelu) value = gelu(value);
            if (residual) value += load_some(residual, (first_row + r) * p->residual_stride + column, mask, e);
            store_some(out, (first_row + r) * p->num_columns + column, value, mask, e);
        }
    }
}

/* Multiplies some rows, few enough that all of them stay in a near cache while the weight passes.
 *
 * Panels are shared out evenly, as a thread that goes through neighbours reads one stream. A thread that is done helps
 * the others: one that the system has taken its core from for a while would keep all waiting. */
static int multiply_block(const struct product *p, const struct kernel *kernel, int64_t first_row, int64_t rows,
                          const char *x, const void *residual, int has_gelu, void *out, int num_threads) {
    int64_t tiles = ceil_div(rows, kernel->tile_rows), panels = num_panels(p->num_columns);
    int64_t x_bytes = p->x_stride * bytes_of((enum element)p->element);
    int failed = 0, are_few = rows <= FEW_ROWS && tiles == 1;
    struct share *shares = allocate(num_threads * (int64_t)sizeof(struct share));
    char *shared = are_few ? NULL : allocate(rows * kernel->row_bytes);
    if (shares == NULL || (shared == NULL && !are_few)) {
        free(shares), free(shared);
        return 1;
    }
    for (int i = 0; i < num_threads; i++)
        shares[i] = (struct share){i * panels / num_threads, (i + 1) * panels / num_threads, {0}};
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        float *sums = allocate(rows * COLUMNS * 4);
        /* Each thread packs few rows for itself: to wait for another one takes longer. */
        char *packed = are_few ? allocate(rows * kernel->row_bytes) : shared;
        failed = sums == NULL || packed == NULL;
        if (are_few) {
            if (!failed) kernel->pack_tile(p, x + first_row * x_bytes, rows, packed);
        } else {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) {
                int64_t first = t * rows / tiles;
                kernel->pack_tile(p, x + (first_row + first) * x_bytes, (t + 1) * rows / tiles - first,
                                  packed + first * kernel->row_bytes);
            }
        }
#pragma omp for schedule(static, 1) nowait
        for (int own = 0; own < num_threads; own++)
            for (int i = 0; !failed && i < num_threads; i++) {
                struct share *share = &shares[(own + i) % num_threads];
                int64_t panel;
                while ((panel = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED)) < share->end) {
                    kernel->multiply_panel(p, rows, panel, packed, sums);
                    finish_panel(p, first_row, rows, panel, sums, residual, has_gelu, out);
                }
            }
        free(sums);
        if (are_few) free(packed);
    }
    free(shares), free(shared);
    return failed;
}

/* Writes x [num_rows, depth] times the weight, plus the bias, to `out` [num_rows, num_columns]; then either its GELU,
 * or plus `residual` [num_rows, num_columns] if that is not NULL. Returns 0, or 1 if there was no memory. */
static int multiply_rows(const struct product *p, const struct kernel *kernel, const void *x, const void *residual,
                         int has_gelu, void *out, int num_threads) {
    int64_t blocks = ceil_div(p->num_rows, BLOCK_ROWS);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t first = b * p->num_rows / blocks, rows = (b + 1) * p->num_rows / blocks - first;
        if (multiply_block(p, kernel, first, rows, x, residual, has_gelu, out, num_threads)) return 1;
    }
    return 0;
}

#endif
