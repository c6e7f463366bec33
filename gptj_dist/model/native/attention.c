/* Causal attention of a micro-batch's rows over a paged cache of keys and values, for CPUs.
 *
 * A row has the same bits whatever rows are computed with it: every sum of a row runs over its keys (or the dimensions
 * of a key) one after the other, whether the row is alone or one of a tile. What a tile shares is only loads.
 *
 * Blocks hold LANES tokens, a vector's worth: keys lie [block, head, head_dim, LANES], so that LANES scores are made
 * at once without adding across a vector, and values [block, head, LANES, padded_dim].
 *
 * OpenMP's symbols are those of the library that torch has loaded, so both use the same threads.
 */

#include "vectors.h"

#define TILE_ROWS 8   /* rows that share the loads of a chunk's keys and values */
#define AHEAD 4       /* blocks whose scores a lone row computes side by side, as one sum waits for itself */
#define ITEM_ROWS 16  /* heads times rows that a thread works on at a time, at most */

/* One micro-batch, the same in every layer. Elements are those of `heads` and of the cache. */
struct batch {
    int64_t num_rows, num_tiles, num_heads, head_dim, padded_dim, rotary_dim;
    int64_t row_stride;       /* elements between rows of `heads` */
    int64_t table_stride;     /* blocks a table has room for */
    int64_t max_tokens;       /* keys of the row that has most */
    const int32_t *positions; /* [num_rows] */
    const int32_t *spans;     /* [num_rows]: which block table is the row's */
    const int32_t *tables;    /* [spans, table_stride] */
    const int32_t *tiles;     /* [num_tiles, 2]: first row, and rows: consecutive tokens of one request */
    const float *cos, *sin;   /* [positions, rotary_dim / 2] */
};

/* A tile for some heads: what one thread does at a time. */
struct item {
    const struct batch *batch;
    const int32_t *table;
    int64_t first_row, first_head, num_heads, num_blocks;
};

/* A thread's scratch memory; [num_heads, rows, ..] of an item each. */
struct scratch {
    float *queries, *scores, *sums;
};

/* One head of a row, rotated (Su et al. 2021, interleaved pairs) and scaled, in float32. */
INLINE void rotate(const struct batch *b, int64_t row, const void *heads, int64_t index, float scale, enum element e,
                   float *out) {
    int64_t pairs = b->rotary_dim / 2, place = (int64_t)b->positions[row] * pairs;
    const float *cos = b->cos + place, *sin = b->sin + place;
    for (int64_t d = 0; d < b->head_dim; d++) out[d] = load_one(heads, index + d, e);
    for (int64_t i = 0; i < pairs; i++) {
        float even = out[2 * i], odd = out[2 * i + 1];
        out[2 * i] = even * cos[i] - odd * sin[i];
        out[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
    for (int64_t d = 0; d < b->head_dim; d++) out[d] *= scale;
}

INLINE int64_t part(const struct batch *b, int64_t row, int64_t which, int64_t head) {
    return row * b->row_stride + (which * b->num_heads + head) * b->head_dim;
}

/* Puts the key and the value of one head of a row into the cache. */
INLINE void store_row(const struct batch *b, int64_t row, int64_t head, const void *heads, void *keys, void *values,
                      enum element e, float *rotated) {
    int64_t lane = b->positions[row] % LANES, place = b->positions[row] / LANES;
    int64_t block = b->tables[b->spans[row] * b->table_stride + place] * b->num_heads + head;
    int64_t key = block * b->head_dim * LANES + lane, value = (block * LANES + lane) * b->padded_dim;
    rotate(b, row, heads, part(b, row, 1, head), 1.0f, e, rotated);
    for (int64_t d = 0; d < b->head_dim; d++) store_one(keys, key + d * LANES, rotated[d], e);
    int64_t from = part(b, row, 2, head);
    for (int64_t d = 0; d < b->head_dim; d++) store_one(values, value + d, load_one(heads, from + d, e), e);
    for (int64_t d = b->head_dim; d < b->padded_dim; d++) store_one(values, value + d, 0.0f, e);
}

INLINE const char *block_of(const struct item *it, int64_t place, int64_t head, const void *cache, int64_t elements,
                            enum element e) {
    return (const char *)cache + (it->table[place] * it->batch->num_heads + head) * elements * bytes_of(e);
}

/* Asks for `elements` of a block before they are needed: blocks lie scattered, which no hardware guesses. */
INLINE void fetch_ahead(const char *block, int64_t elements, enum element e) {
    for (int64_t at = 0; at < elements * bytes_of(e); at += CACHE_LINE) __builtin_prefetch(block + at, 0, 2);
}

/* Scores of `rows` rows with the keys of `blocks` blocks from `place` on, of one head. */
INLINE void score_blocks(const struct item *it, int64_t place, int blocks, int64_t head, const void *keys, int rows,
                         enum element e, const float *queries, float *scores, int64_t score_stride) {
    const struct batch *b = it->batch;
    floats sums[AHEAD * TILE_ROWS];
    const char *key[AHEAD];
    for (int k = 0; k < blocks; k++) key[k] = block_of(it, place + k, head, keys, b->head_dim * LANES, e);
    for (int i = 0; i < blocks * rows; i++) sums[i] = splat(0.0f);
    for (int64_t d = 0; d < b->head_dim; d++)
        for (int k = 0; k < blocks; k++) {
            floats lanes = load(key[k], d * LANES, e);
            for (int r = 0; r < rows; r++) {
                floats *sum = &sums[k * rows + r];
                *sum = fused(splat(queries[r * b->padded_dim + d]), lanes, *sum);
            }
        }
    for (int k = 0; k < blocks; k++)
        for (int r = 0; r < rows; r++)
            __builtin_memcpy(scores + r * score_stride + (place + k) * LANES, &sums[k * rows + r], sizeof(floats));
}

/* Turns a row's scores into weights e^(score - largest), 0 for keys after the row; returns 1 / their sum. */
INLINE float weigh(float *scores, int64_t num_keys, int64_t num_blocks) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats most = splat(-INFINITY), sum = splat(0.0f);
    for (int64_t place = 0; place < num_blocks; place++) {
        floats s;
        __builtin_memcpy(&s, scores + place * LANES, sizeof s);
        ints is_seen = lane < (int32_t)(num_keys - place * LANES);
        s = (floats)(((ints)s & is_seen) | ((ints)splat(-INFINITY) & ~is_seen));
        most = larger(most, s);
        __builtin_memcpy(scores + place * LANES, &s, sizeof s);
    }
    float largest = most[0], total = 0.0f;
    for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    for (int64_t place = 0; place < num_blocks; place++) {
        floats s;
        __builtin_memcpy(&s, scores + place * LANES, sizeof s);
        s = exponential(s - splat(largest));
        sum += s;
        __builtin_memcpy(scores + place * LANES, &s, sizeof s);
    }
    for (int i = 0; i < LANES; i++) total += sum[i];
    return 1.0f / total;
}

/* Adds the first `tokens` values of a block, weighted, to the rows' sums; `wide` vectors of the head at a time. */
INLINE void add_values(const struct batch *b, const char *value, int64_t tokens, int rows, int wide, enum element e,
                       const float *weights, int64_t weight_stride, float *sums) {
    for (int64_t d = 0; d < b->padded_dim; d += wide * LANES) {
        floats part[TILE_ROWS * 4];
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < wide; w++)
                __builtin_memcpy(&part[r * wide + w], sums + r * b->padded_dim + d + w * LANES, sizeof(floats));
        for (int64_t t = 0; t < tokens; t++)
            for (int w = 0; w < wide; w++) {
                floats v = load(value, t * b->padded_dim + d + w * LANES, e);
                for (int r = 0; r < rows; r++)
                    part[r * wide + w] = fused(splat(weights[r * weight_stride + t]), v, part[r * wide + w]);
            }
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < wide; w++)
                __builtin_memcpy(sums + r * b->padded_dim + d + w * LANES, &part[r * wide + w], sizeof(floats));
    }
}

/* Scores of all rows of an item with all their keys. Block by block, as a block's heads lie side by side. */
INLINE void score_item(const struct item *it, int rows, const void *keys, enum element e, const struct scratch *s) {
    const struct batch *b = it->batch;
    int64_t num_blocks = it->num_blocks, stride = num_blocks * LANES, elements = b->head_dim * LANES;
    int together = rows == 1 ? AHEAD : 1;
    for (int64_t place = 0; place < num_blocks; place += together) {
        for (int64_t h = 0; h < it->num_heads; h++) {
            int64_t head = it->first_head + h;
            const float *queries = s->queries + h * rows * b->padded_dim;
            float *scores = s->scores + h * rows * stride;
            for (int64_t next = place + together; next < place + 2 * together && next < num_blocks; next++)
                fetch_ahead(block_of(it, next, head, keys, elements, e), elements, e);
            int64_t left = num_blocks - place;
            if (left >= together) {
                score_blocks(it, place, together, head, keys, rows, e, queries, scores, stride);
                continue;
            }
            if (left & 2) score_blocks(it, place, 2, head, keys, rows, e, queries, scores, stride);
            if (left & 1) score_blocks(it, num_blocks - 1, 1, head, keys, rows, e, queries, scores, stride);
        }
    }
}

/* Sums of the values of an item's first `num_keys` keys, weighted by the scores that have become weights. */
INLINE void sum_item(const struct item *it, int64_t num_keys, int rows, const void *values, enum element e,
                     const struct scratch *s) {
    const struct batch *b = it->batch;
    int64_t D = b->padded_dim, num_blocks = it->num_blocks, stride = num_blocks * LANES, elements = LANES * D;
    for (int64_t i = 0; i < it->num_heads * rows * D; i++) s->sums[i] = 0.0f;
    for (int64_t place = 0; place < num_blocks; place++) {
        int64_t tokens = num_keys - place * LANES < LANES ? num_keys - place * LANES : LANES;
        for (int64_t h = 0; h < it->num_heads; h++) {
            int64_t head = it->first_head + h;
            if (place + 1 < num_blocks) fetch_ahead(block_of(it, place + 1, head, values, elements, e), elements, e);
            const char *value = block_of(it, place, head, values, elements, e);
            const float *weights = s->scores + h * rows * stride + place * LANES;
            float *sums = s->sums + h * rows * D;
            if (rows == 1 && D % (4 * LANES) == 0)
                add_values(b, value, tokens, rows, 4, e, weights, stride, sums);
            else if (D % (2 * LANES) == 0)
                add_values(b, value, tokens, rows, 2, e, weights, stride, sums);
            else
                add_values(b, value, tokens, rows, 1, e, weights, stride, sums);
        }
    }
}

/* Attends for an item; `rows` is known to the compiler. Rows beyond the tile's own are computed and dropped. */
INLINE void attend(const struct item *it, int64_t own_rows, int rows, void *heads, const void *keys,
                   const void *values, enum element e, const struct scratch *s) {
    const struct batch *b = it->batch;
    int64_t D = b->padded_dim, num_keys = b->positions[it->first_row + own_rows - 1] + 1;
    float scale = 1.0f / sqrtf((float)b->head_dim), scales[ITEM_ROWS];
    for (int64_t h = 0; h < it->num_heads; h++)
        for (int r = 0; r < own_rows; r++)
            rotate(b, it->first_row + r, heads, part(b, it->first_row + r, 0, it->first_head + h), scale, e,
                   s->queries + (h * rows + r) * D);
    score_item(it, rows, keys, e, s);
    for (int64_t h = 0; h < it->num_heads; h++)
        for (int r = 0; r < rows; r++) {
            int64_t seen = r < own_rows ? b->positions[it->first_row + r] + 1 : num_keys;
            float *scores = s->scores + (h * rows + r) * it->num_blocks * LANES;
            scales[h * rows + r] = weigh(scores, seen, it->num_blocks);
        }
    sum_item(it, num_keys, rows, values, e, s);
    for (int64_t h = 0; h < it->num_heads; h++)
        for (int r = 0; r < own_rows; r++) {
            int64_t to = part(b, it->first_row + r, 2, it->first_head + h);
            const float *sums = s->sums + (h * rows + r) * D;
            for (int64_t d = 0; d < b->head_dim; d++)
                store_one(heads, to + d, sums[d] * scales[h * rows + r], e);
        }
}

/* Heads that an item takes: a chunk's one by one, as their keys stay in a near cache; a lone row's as many as leave
 * every thread its share, as blocks hold their heads side by side. */
INLINE int64_t heads_per_item(const struct batch *b, int64_t tile_rows, int64_t num_shares) {
    int64_t num_heads = tile_rows > 1 ? 1 : b->num_heads * b->num_tiles / num_shares;
    return num_heads < 1 ? 1 : num_heads > ITEM_ROWS ? ITEM_ROWS : num_heads;
}

INLINE int attend_all(const struct batch *b, void *heads, void *keys, void *values, int num_threads, enum element e) {
    int64_t room = (b->max_tokens + LANES) / LANES * LANES;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        struct scratch s;
        int64_t elements = ITEM_ROWS * b->padded_dim;
        s.queries = aligned_alloc(64, (2 * elements + ITEM_ROWS * room) * sizeof(float));
        s.sums = s.queries + elements;
        s.scores = s.sums + elements;
        failed = s.queries == NULL;
        for (int64_t i = 0; !failed && i < elements; i++) s.queries[i] = 0.0f;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b->num_rows * b->num_heads; i++)
            if (!failed) store_row(b, i / b->num_heads, i % b->num_heads, heads, keys, values, e, s.queries);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < b->num_tiles * b->num_heads; i++) {
            /* The last tile of a chunk has most keys: it comes first. */
            int64_t tile = b->num_tiles - 1 - i / b->num_heads, head = i % b->num_heads;
            int64_t first = b->tiles[2 * tile], own = b->tiles[2 * tile + 1];
            int64_t group = heads_per_item(b, own, num_threads * 4);
            if (failed || head % group) continue;
            struct item it = {b, b->tables + b->spans[first] * b->table_stride, first, head,
                              b->num_heads - head < group ? b->num_heads - head : group,
                              b->positions[first + own - 1] / LANES + 1};
            if (own == 1)
                attend(&it, 1, 1, heads, keys, values, e, &s);
            else
                attend(&it, own, TILE_ROWS, heads, keys, values, e, &s);
        }
        free(s.queries);
    }
    return failed;
}

/* Whether this CPU's sums are of products that are not rounded: only then are the bits those of other CPUs. */
int has_fused(void) {
#if defined(__AVX512F__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return 1;
#else
    return 0;
#endif
}

/* Rotates queries and keys of `heads` [rows, 3, num_heads, head_dim], stores keys and values, and overwrites the
 * values with what the rows attend to. Returns 0, or 1 if there was no memory. */
int attend_float32(const struct batch *b, void *heads, void *keys, void *values, int num_threads) {
    return attend_all(b, heads, keys, values, num_threads, FLOAT32);
}

int attend_bfloat16(const struct batch *b, void *heads, void *keys, void *values, int num_threads) {
    return attend_all(b, heads, keys, values, num_threads, BFLOAT16);
}
