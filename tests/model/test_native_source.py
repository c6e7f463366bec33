"""The C sources touch no memory but their own, and agree with the Python that calls them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from gptj_dist.model.native import low_rank
from gptj_dist.model.native.attention import LANES, TILE_ROWS
from gptj_dist.model.native.library import COMPILE, HEADERS, SOURCES, Adapted, LowRank, NativeBatch, Product

COMPILE_TIMEOUT_S = 120
ATTENTION, PRODUCT, LOW_BIT, LOW_RANK, _ = SOURCES
_, PANELS = HEADERS

FILLED = r"""
#include "%s"
#include <stdio.h>
#include <string.h>

static void *filled(int64_t count, size_t size) { /* a buffer of just this length, of small numbers */
    unsigned char *bytes = malloc(count * size);
    for (int64_t i = 0; i < count; i++) {
        float value = (float)((i * 7919) %% 201 - 100) / 100;
        memcpy(bytes + i * size, (char *)&value + (size == 2 ? 2 : 0), size);
    }
    return bytes;
}
"""

ATTENTION_MAIN = (
    FILLED
    + r"""
static uint64_t checksum = 14695981039346656037u; /* FNV-1a of all results */

static void add_to_checksum(const void *base, int64_t size) {
    for (int64_t i = 0; i < size; i++) checksum = (checksum ^ ((const unsigned char *)base)[i]) * 1099511628211u;
}

/* Requests of 1, 2, .. rows at the end of contexts of uneven length; blocks in reverse. */
static int run(int64_t heads, int64_t head_dim, int64_t rotary, int64_t requests, int64_t longest, enum element e) {
    int64_t padded = (head_dim + LANES - 1) / LANES * LANES, table = (longest + LANES - 1) / LANES;
    int64_t rows = 0, tiles = 0, size = bytes_of(e), blocks = requests * table;
    int32_t *positions = malloc(requests * longest * 4), *slots = malloc(requests * longest * 4);
    int32_t *tables = malloc(blocks * 4), *pieces = malloc(requests * longest * 8);
    for (int64_t i = 0; i < blocks; i++) tables[i] = blocks - 1 - i;
    for (int64_t r = 0; r < requests; r++) {
        int64_t count = 1 + r * 9 %% longest, start = longest - count;
        for (int64_t i = 0; i < count; i++) {
            if (i %% TILE_ROWS == 0) {
                pieces[2 * tiles] = rows;
                pieces[2 * tiles++ + 1] = count - i < TILE_ROWS ? count - i : TILE_ROWS;
            }
            positions[rows] = start + i;
            slots[rows++] = r;
        }
    }
    positions = realloc(positions, rows * 4), slots = realloc(slots, rows * 4), pieces = realloc(pieces, tiles * 8);
    int64_t stride = 3 * heads * head_dim + 5;
    void *qkv = filled((rows - 1) * stride + 3 * heads * head_dim, size);
    void *keys = filled(blocks * heads * head_dim * LANES, size);
    void *values = filled(blocks * heads * LANES * padded, size);
    float *cos = filled(longest * rotary / 2, 4), *sin = filled(longest * rotary / 2, 4);
    struct batch b = {rows, tiles, heads, head_dim, padded, rotary, stride, table, longest,
                      positions, slots, tables, pieces, cos, sin};
    int failed = 0;
    for (int threads = 1; threads <= 2; threads++)
        failed |= (e == FLOAT32 ? attend_float32 : attend_bfloat16)(&b, qkv, keys, values, threads);
    add_to_checksum(qkv, ((rows - 1) * stride + 3 * heads * head_dim) * size);
    free(qkv), free(keys), free(values), free(cos), free(sin);
    free(positions), free(slots), free(tables), free(pieces);
    return failed;
}

int main(void) {
    int failed = 0;
    for (int e = FLOAT32; e <= BFLOAT16; e++)
        failed |= run(3, 5, 4, 4, 37, e) | run(17, 16, 16, 5, 16, e) | run(2, 80, 20, 3, 33, e) |
                  run(4, 64, 64, 1, 1, e) | run(2, 256, 64, 3, 65, e);
    fprintf(stderr, "%%016llx", (unsigned long long)checksum);
    printf("%%s\n", failed ? "failed" : "done");
    return failed;
}
"""
)

PRODUCT_MAIN = (
    FILLED
    + r"""
#ifdef UNROLL
static int run(int64_t rows, int64_t columns, int64_t depth) {
    int64_t x_stride = depth + 3, residual_stride = columns + 1;
    void *weight = filled(columns * depth, 2), *bias = filled(columns, 2);
    void *x = filled((rows - 1) * x_stride + depth, 2);
    void *residual = filled((rows - 1) * residual_stride + columns, 2), *out = filled(rows * columns, 2);
    struct product p = {rows, columns, depth, x_stride, residual_stride, BFLOAT16, 0, 0, NULL, bias, NULL, NULL};
    void *packed = p.weight = aligned_alloc(64, size_of_bfloat16(&p));
    int failed = 0;
    for (int threads = 1; threads <= 2; threads++) {
        pack_bfloat16(&p, weight, threads);
        failed |= multiply_bfloat16(&p, x, NULL, 1, out, threads) | multiply_bfloat16(&p, x, residual, 0, out, threads);
    }
    free(weight), free(bias), free(x), free(residual), free(out), free(packed);
    return failed;
}

int main(void) {
    int failed = run(1, 1, 1) | run(2, 5, 1) | run(15, 33, 17) | run(14, 32, 16) | run(141, 75, 173) | run(3, 47, 2100);
    printf("%%s\n", failed ? "failed" : "done");
    return failed;
}
#else
int main(void) { printf("not for this CPU\n"); return 0; }
#endif
"""
)

LOW_BIT_MAIN = (
    FILLED
    + r"""
#ifdef FOLD
static int run(int64_t bits, int64_t rows, int64_t columns, int64_t depth, int64_t group, enum element e) {
    int64_t x_stride = depth + 3, residual_stride = columns + 1, size = bytes_of(e);
    int64_t scales = num_panels(columns) * COLUMNS * (depth / group);
    void *weight = filled(columns * depth * bits / 8, 1), *bias = filled(columns, size);
    void *x = filled((rows - 1) * x_stride + depth, size);
    void *residual = filled((rows - 1) * residual_stride + columns, size), *out = filled(rows * columns, size);
    float *scale = aligned_alloc(64, scales * 4), *offset = aligned_alloc(64, scales * 4);
    for (int64_t i = 0; i < scales; i++) scale[i] = offset[i] = 0.5f;
    struct product p = {rows, columns, depth, x_stride, residual_stride, e, bits, group, NULL, bias, scale, offset};
    void *packed = p.weight = aligned_alloc(64, size_of_low_bit(&p));
    int failed = 0;
    for (int threads = 1; threads <= 2; threads++) {
        pack_low_bit(&p, weight, threads);
        failed |= multiply_low_bit(&p, x, NULL, 1, out, threads) | multiply_low_bit(&p, x, residual, 0, out, threads);
    }
    free(weight), free(bias), free(x), free(residual), free(out), free(packed), free(scale), free(offset);
    return failed;
}

int main(void) {
    int failed = 0;
    for (int e = FLOAT32; e <= BFLOAT16; e++)
        failed |= run(8, 1, 1, 1, 1, e) | run(8, 2, 5, 7, 7, e) | run(8, 17, 33, 2100, 2100, e) |
                  run(8, 145, 32, 96, 32, e) | run(4, 1, 3, 2, 2, e) | run(4, 3, 75, 192, 64, e) |
                  run(4, 9, 32, 96, 32, e) | run(4, 8, 64, 4160, 64, e);
    printf("%%s\n", failed ? "failed" : "done");
    return failed;
}
#else
int main(void) { printf("not for this CPU\n"); return 0; }
#endif
"""
)

LOW_RANK_MAIN = (
    FILLED
    + r"""
/* Two groups of rows; the second one has no matrices at the first of two places. Rows are in reverse. */
static int run(int64_t rank, int64_t depth, int64_t columns, int64_t own_rows, enum element e) {
    int64_t size = bytes_of(e), num_rows = 2 * own_rows, x_stride = depth + 3, y_stride = 2 * columns + 1, tiles = 0;
    int64_t *all = malloc(num_rows * 8), *pieces = malloc(num_rows * 24);
    float *strengths = filled(num_rows, 4);
    for (int64_t i = 0; i < num_rows; i++) all[i] = num_rows - 1 - i;
    for (int64_t group = 0; group < 2; group++)
        for (int64_t i = 0; i < own_rows; i += TILE_ROWS, tiles++) {
            pieces[3 * tiles] = group, pieces[3 * tiles + 1] = group * own_rows + i;
            pieces[3 * tiles + 2] = own_rows - i < TILE_ROWS ? own_rows - i : TILE_ROWS;
        }
    pieces = realloc(pieces, tiles * 24);
    void *a = filled(rank * padded(depth), size), *b = filled((columns + COLUMNS - 1) / COLUMNS * COLUMNS * rank, size);
    void *x = filled((num_rows - 1) * x_stride + depth, size);
    void *y = filled((num_rows - 1) * y_stride + 2 * columns, size);
    struct low_rank full = {rank, depth, columns, a, b}, empty = {0, 0, 0, NULL, NULL};
    struct low_rank first[] = {full, full}, second[] = {empty, full};
    const struct low_rank *tables[] = {first, second};
    struct adapted d = {tiles, 2, 2, depth, columns, x_stride, y_stride, pieces, all, strengths, tables};
    int failed = 0;
    for (int threads = 1; threads <= 2; threads++)
        failed |= (e == FLOAT32 ? add_low_rank_float32 : add_low_rank_bfloat16)(&d, 0, x, y, threads);
    d.depth++;
    failed |= add_low_rank_float32(&d, 0, x, y, 1) != MISFIT;
    free(all), free(pieces), free(strengths), free(a), free(b), free(x), free(y);
    return failed;
}

int main(void) {
    int failed = 0;
    for (int e = FLOAT32; e <= BFLOAT16; e++)
        failed |= run(1, 1, 1, 1, e) | run(3, 75, 33, 2, e) | run(16, 64, 48, 5, e) | run(64, 33, 31, 3, e) |
                  run(5, 190, 17, 9, e);
    printf("%%s\n", failed ? "failed" : "done");
    return failed;
}
"""
)


@pytest.mark.parametrize(
    ("source", "main"),
    [(ATTENTION, ATTENTION_MAIN), (PRODUCT, PRODUCT_MAIN), (LOW_BIT, LOW_BIT_MAIN), (LOW_RANK, LOW_RANK_MAIN)],
)
def test_no_access_is_out_of_bounds_and_nothing_is_undefined(tmp_path: Path, source: Path, main: str) -> None:
    """Compiled with the sanitizers, on buffers of just the length that the shapes ask for."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    (tmp_path / "main.c").write_text(main % source)
    program = tmp_path / "main"
    flags = ("-O1", "-march=native", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = subprocess.run(
        [compiler, *flags, str(tmp_path / "main.c"), "-lm", "-o", str(program)],
        capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False,
    )  # fmt: skip
    if "cannot find" in built.stderr:
        pytest.skip("there are no sanitizers to link with")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if ran.stdout == "not for this CPU\n":
        pytest.skip("this CPU has no such product")
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


def test_bits_of_attention_depend_neither_on_the_vectors_nor_on_the_compilers_choices(tmp_path: Path) -> None:
    """On CPUs with fused multiply-add, which is written out where sums are made."""
    compiler, cpu = shutil.which("gcc"), Path("/proc/cpuinfo")
    if compiler is None or not cpu.exists() or not {"avx2", "fma"} <= set(cpu.read_text().split()):
        pytest.skip("needs gcc and a CPU with AVX2 and FMA")
    (tmp_path / "main.c").write_text(ATTENTION_MAIN % ATTENTION)

    def checksum(*flags: str) -> str:
        command = [compiler, *flags, str(tmp_path / "main.c"), "-lm", "-o", str(tmp_path / "main")]
        subprocess.run(command, check=True, timeout=COMPILE_TIMEOUT_S)
        ran = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=True)
        return ran.stderr

    product_flags = [flag for flag in COMPILE if flag != "-c"]
    others = [flag for flag in product_flags if not flag.startswith(("-O", "-march"))]
    choices = ("-O1 -march=native", "-O3 -march=haswell")
    assert {flags: checksum(*others, *flags.split()) for flags in choices} == dict.fromkeys(
        choices, checksum(*product_flags)
    )


def test_tiles_are_as_long_as_the_source_has_them() -> None:
    lines = [line for path in (ATTENTION, *HEADERS) for line in path.read_text().splitlines()]
    assert f"#define LANES {LANES}" in lines
    assert any(line.startswith(f"#define TILE_ROWS {TILE_ROWS} ") for line in lines)
    lines = LOW_RANK.read_text().splitlines()
    for name in ("TILE_ROWS", "INPUTS", "MISFIT"):
        assert any(line.split()[:3] == ["#define", name, str(vars(low_rank)[name])] for line in lines)


@pytest.mark.parametrize(
    ("name", "source", "structure"),
    [
        ("batch", ATTENTION, NativeBatch),
        ("product", PANELS, Product),
        ("low_rank", LOW_RANK, LowRank),
        ("adapted", LOW_RANK, Adapted),
    ],
)
def test_a_structure_is_passed_as_the_source_has_it(name: str, source: Path, structure: type[ctypes.Structure]) -> None:
    declaration = source.read_text().partition(f"struct {name} {{")[2].partition("};")[0]
    code = " ".join(line.split("/*")[0].strip() for line in declaration.splitlines())
    names = [
        name.strip().lstrip("* ")
        for statement in code.split(";")
        for name in statement.replace("const", "").replace("struct", "").strip().partition(" ")[2].split(",")
        if name.strip()
    ]
    assert names == [field[0] for field in structure._fields_]
    assert all(ctypes.sizeof(field[1]) == 8 for field in structure._fields_)
