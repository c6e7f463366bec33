/* y += strength * B A x for rows that have matrices of their own, for CPUs.
 *
 * Sums are in float32. A sum of A's runs over vectors of inputs, one after the other, then over the vector; one of B's
 * over the ranks. So a row has the same bits whatever rows are beside it. Rows of a tile share the loads of matrices.
 */

#include "vectors.h"

#define TILE_ROWS 4
#define RANKS 4 /* of A, which share the loads of x; 16 sums of 32 registers */
#define COLUMN_VECTORS 2
#define COLUMNS (COLUMN_VECTORS * LANES)
#define INPUTS 32 /* a multiple of those of a vector */
#define NO_MEMORY 1
#define MISFIT 2

/* Elements are those of x and y. */
struct low_rank {
    int64_t rank, depth, num_columns; /* a rank of 0: nothing is added */
    const void *a;                    /* [rank, padded(depth)], with zeros beyond depth */
    const void *b;                    /* [panel, rank, COLUMNS], with any numbers beyond num_columns */
};

/* The rows of a micro-batch that have matrices, each in one tile. */
struct adapted {
    int64_t num_tiles, num_groups;
    int64_t num_places, depth, num_columns; /* y is [rows, num_places, num_columns] */
    int64_t x_stride, y_stride;             /* elements between rows */
    const int64_t *tiles;                   /* [num_tiles, 3]: group, first of its rows, and rows */
    const int64_t *rows;
    const float *strengths;
    const struct low_rank *const *tables; /* [num_groups] */
};

INLINE int64_t padded(int64_t depth) { return (depth + INPUTS - 1) / INPUTS * INPUTS; }

struct tile {
    const struct low_rank *matrices;
    const char *x[TILE_ROWS];
    char *y[TILE_ROWS];
    const float *strengths;
};

INLINE float total(floats v) {
    float part[LANES];
    __builtin_memcpy(part, &v, sizeof v);
    for (int i = 0; i < 8; i++) part[i] += part[i + 8];
    for (int i = 0; i < 4; i++) part[i] += part[i + 4];
    return (part[0] + part[2]) + (part[1] + part[3]);
}

#if defined(__AVX512BF16__)
/* Inputs of a vector, and its products with another one: bfloat16 in pairs, which the CPU adds. */
INLINE int64_t inputs_of(enum element e) { return VECTOR_BYTES / bytes_of(e); }

INLINE floats multiply(floats a, floats b, floats sum, enum element e) {
    return e == BFLOAT16 ? (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b) : fused(a, b, sum);
}

INLINE floats load_inputs(const void *base, int64_t index, enum element e) {
    return load((const char *)base + index * bytes_of(e), 0, FLOAT32);
}
#else
INLINE int64_t inputs_of(enum element e) { return LANES; }

INLINE floats multiply(floats a, floats b, floats sum, enum element e) { return fused(a, b, sum); }

INLINE floats load_inputs(const void *base, int64_t index, enum element e) { return load(base, index, e); }
#endif

/* Writes A x of some ranks to `inner` [rank, rows]. `rows` and `ranks` are known to the compiler. */
INLINE void shrink(const struct tile *t, int rows, int64_t first, int ranks, enum element e, float *inner) {
    int64_t depth = padded(t->matrices->depth);
    const char *a = (const char *)t->matrices->a + first * depth * bytes_of(e);
    floats sums[RANKS * TILE_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ranks * rows; i++) sums[i] = splat(0.0f);
    for (int64_t k = 0; k < depth; k += inputs_of(e)) {
        floats x[TILE_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) x[r] = load_inputs(t->x[r], k, e);
#pragma GCC unroll 4
        for (int i = 0; i < ranks; i++) {
            floats weights = load_inputs(a, i * depth + k, e);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sums[i * rows + r] = multiply(x[r], weights, sums[i * rows + r], e);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ranks * rows; i++) inner[first * rows + i] = total(sums[i]);
}

/* Adds a panel of B times `inner`, times the strengths, to y. Known to the compiler: `rows`, whether the panel is whole. */
INLINE void expand(const struct tile *t, int rows, int64_t column, int is_whole, enum element e, const float *inner) {
    const struct low_rank *m = t->matrices;
    const char *b = (const char *)m->b + column * m->rank * bytes_of(e);
    floats sums[TILE_ROWS * COLUMN_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows * COLUMN_VECTORS; i++) sums[i] = splat(0.0f);
    for (int64_t k = 0; k < m->rank; k++)
#pragma GCC unroll 2
        for (int v = 0; v < COLUMN_VECTORS; v++) {
            floats weights = load(b, k * COLUMNS + v * LANES, e);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[v * rows + r] = fused(splat(inner[k * rows + r]), weights, sums[v * rows + r]);
        }
#pragma GCC unroll 2
    for (int v = 0; v < COLUMN_VECTORS; v++) {
        int64_t place = column + v * LANES, rest = m->num_columns - place;
        int64_t count = is_whole || rest > LANES ? LANES : rest > 0 ? rest : 0;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            floats y = load_first(t->y[r], place, count, e);
            store_first(t->y[r], place, count, fused(splat(t->strengths[r]), sums[v * rows + r], y), e);
        }
    }
}

INLINE void add_to_tile(const struct tile *t, int rows, enum element e, float *inner) {
    int64_t rank = t->matrices->rank, num_columns = t->matrices->num_columns, k = 0, column = 0;
    for (; k + RANKS <= rank; k += RANKS) shrink(t, rows, k, RANKS, e, inner);
    for (; k < rank; k++) shrink(t, rows, k, 1, e, inner);
    for (; column + COLUMNS <= num_columns; column += COLUMNS) expand(t, rows, column, 1, e, inner);
    if (column < num_columns) expand(t, rows, column, 0, e, inner);
}

INLINE void add_to_any_tile(const struct tile *t, int64_t rows, enum element e, float *inner) {
    switch (rows) {
        case 1: add_to_tile(t, 1, e, inner); break;
        case 2: add_to_tile(t, 2, e, inner); break;
        case 3: add_to_tile(t, 3, e, inner); break;
        default: add_to_tile(t, TILE_ROWS, e, inner);
    }
}

INLINE int add_to_all(const struct adapted *d, int64_t first_place, const void *x, void *y, int num_threads,
                      enum element e) {
    int64_t num_items = d->num_places * d->num_tiles, depth = padded(d->depth), most = 0;
    int failed = 0;
    for (int64_t i = 0; i < d->num_places * d->num_groups; i++) {
        const struct low_rank *m = d->tables[i % d->num_groups] + first_place + i / d->num_groups;
        if (m->rank && (m->depth != d->depth || m->num_columns != d->num_columns)) return MISFIT;
        if (m->rank > most) most = m->rank;
    }
#pragma omp parallel num_threads(num_items > 1 ? num_threads : 1) reduction(| : failed)
    {
        float *inner = calloc((most + depth) * TILE_ROWS, sizeof(float));
        char *inputs = (char *)(inner + most * TILE_ROWS); /* rows, with zeros behind them */
        failed = inner == NULL ? NO_MEMORY : 0;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < num_items; i++) {
            const int64_t *tile = d->tiles + i % d->num_tiles * 3, place = i / d->num_tiles;
            struct tile t = {.matrices = d->tables[tile[0]] + first_place + place, .strengths = d->strengths + tile[1]};
            if (failed || t.matrices->rank == 0) continue;
            for (int64_t r = 0; r < tile[2]; r++) {
                int64_t row = d->rows[tile[1] + r];
                t.x[r] = (const char *)x + row * d->x_stride * bytes_of(e);
                if (depth > d->depth)
                    t.x[r] = __builtin_memcpy(inputs + r * depth * bytes_of(e), t.x[r], d->depth * bytes_of(e));
                t.y[r] = (char *)y + (row * d->y_stride + place * d->num_columns) * bytes_of(e);
            }
            add_to_any_tile(&t, tile[2], e, inner);
        }
        free(inner);
    }
    return failed;
}

/* Adds to y what the matrices of the tables' entries from `first_place` on make of x [rows, depth]. Returns 0, NO_MEMORY
 * or MISFIT, if a matrix has other widths. */
int add_low_rank_float32(const struct adapted *d, int64_t first_place, const void *x, void *y, int num_threads) {
    return add_to_all(d, first_place, x, y, num_threads, FLOAT32);
}

int add_low_rank_bfloat16(const struct adapted *d, int64_t first_place, const void *x, void *y, int num_threads) {
    return add_to_all(d, first_place, x, y, num_threads, BFLOAT16);
}
