"""The CPU's cache holds what was written, for whom it was written; it takes memory late and gives it back."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.regions import RegionCache

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 3, 5
MAX_TOKENS, NUM_REQUESTS = 40, 4
MEGABYTE = 2**20


def _regions(max_tokens: int = MAX_TOKENS, head_dim: int = HEAD_DIM) -> RegionCache:
    return RegionCache(NUM_LAYERS, NUM_REQUESTS, max_tokens, NUM_HEADS, head_dim)


def _keys_and_values(seed: int, num_tokens: int, head_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    """[tokens, heads, head_dim] each."""
    both = torch.randn(2, num_tokens, NUM_HEADS, head_dim, generator=torch.Generator().manual_seed(seed))
    return both[0], both[1]


def _write(
    cache: RegionCache, layer: int, request_id: int, start: int, stop: int, keys: Tensor, values: Tensor
) -> None:
    """Writes the request's tokens from `start` to `stop`."""
    batch = MicroBatch((Span(request_id, 0, start, stop - start),), torch.arange(start, stop))
    cache.write(layer, cache.locate(batch), keys, values)


def _read(cache: RegionCache, layer: int, request_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [heads, tokens, head_dim] each."""
    keys, values = cache.read(layer, request_id, num_tokens)
    return keys.transpose(1, 2), values


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_random_walk_reads_back_what_it_wrote() -> None:
    """Requests come, grow by chunks and go, in every order; each reads its own tokens, in every layer."""
    chooser = random.Random(0)
    cache = _regions()
    num_written: dict[int, int] = {}
    for step in range(600):
        if len(num_written) < NUM_REQUESTS and (not num_written or chooser.random() < 0.2):
            cache.add(step)
            num_written[step] = 0
        id_ = chooser.choice(list(num_written))
        start = num_written[id_]
        stop = min(start + chooser.choice((1, 1, 2, 3, 7, 20)), MAX_TOKENS)
        if start == stop or chooser.random() < 0.1:
            cache.release(id_)
            del num_written[id_]
            continue
        num_written[id_] = stop
        for layer in range(NUM_LAYERS):
            keys, values = _keys_and_values(NUM_LAYERS * id_ + layer, MAX_TOKENS)
            _write(cache, layer, id_, start, stop, keys[start:stop], values[start:stop])
        for other in num_written:
            for layer in range(NUM_LAYERS):
                expected = _keys_and_values(NUM_LAYERS * other + layer, MAX_TOKENS)
                for read, written in zip(_read(cache, layer, other, num_written[other]), expected, strict=True):
                    assert torch.equal(read, written[: num_written[other]].transpose(0, 1))


def test_regions_are_read_in_place() -> None:
    cache = _regions()
    cache.add(0)
    keys, _ = _read(cache, 0, 0, 5)
    new_keys, new_values = _keys_and_values(0, 5)
    _write(cache, 0, 0, 0, 5, new_keys, new_values)
    assert torch.equal(keys, new_keys.transpose(0, 1))


@pytest.mark.parametrize(("max_tokens", "head_dim"), [(8, 1), (40, 5), (203, 15), (512, 16), (1024, 33)])
def test_a_region_is_all_zeros_for_the_next_request(max_tokens: int, head_dim: int) -> None:
    """Whether it is less than a page, borders on pages or lies across them; and the regions beside it stay."""
    cache = _regions(max_tokens, head_dim)
    dirt = torch.full((max_tokens, NUM_HEADS, head_dim), torch.inf)
    for id_ in range(NUM_REQUESTS):
        cache.add(id_)
        for layer in range(NUM_LAYERS):
            _write(cache, layer, id_, 0, max_tokens, dirt, dirt)
    for id_ in range(NUM_REQUESTS):
        cache.release(id_)
        cache.add(100 + id_)
        for layer in range(NUM_LAYERS):
            assert all(bool((part == 0).all()) for part in _read(cache, layer, 100 + id_, max_tokens))
            for other in range(id_ + 1, NUM_REQUESTS):
                assert all(bool((part == torch.inf).all()) for part in _read(cache, layer, other, max_tokens))


def test_tokens_that_were_never_written_read_as_zeros() -> None:
    cache = _regions()
    cache.add(0)
    _write(cache, 0, 0, 0, 3, *_keys_and_values(0, 3))
    assert all(bool((part[:, 3:] == 0).all()) for part in _read(cache, 0, 0, MAX_TOKENS))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_is_taken_by_tokens_written_and_given_back_by_release() -> None:
    """A cache of far more than the machine has costs what is written to it, and nothing once that is released."""
    max_tokens, head_dim = 2048, 256
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    region_bytes = 4 * 2 * 16 * max_tokens * head_dim
    num_regions = 2 * machine_bytes // region_bytes
    before = _resident_bytes()
    cache = RegionCache(1, num_regions, max_tokens, 16, head_dim)
    cache.add(0)
    assert _resident_bytes() - before < 16 * MEGABYTE
    rows = torch.ones(1024, 16, head_dim)
    _write(cache, 0, 0, 0, 1024, rows, rows)
    with_rows = _resident_bytes()
    assert with_rows - before > 30 * MEGABYTE
    cache.release(0)
    assert with_rows - _resident_bytes() > 30 * MEGABYTE


def test_a_copy_is_as_long_as_asked_for_in_every_layer_and_a_life_of_its_own() -> None:
    cache = _regions()
    cache.add(0)
    written = [_keys_and_values(layer, 7) for layer in range(NUM_LAYERS)]
    for layer, both in enumerate(written):
        _write(cache, layer, 0, 0, 7, *both)
    cache.add(1)
    cache.copy(0, 1, 5)
    for layer, both in enumerate(written):
        for copied, original in zip(_read(cache, layer, 1, 7), both, strict=True):
            assert torch.equal(copied[:, :5], original[:5].transpose(0, 1))
            assert bool((copied[:, 5:] == 0).all())
        _write(cache, layer, 1, 0, 1, *_keys_and_values(9, 1))
        for kept, original in zip(_read(cache, layer, 0, 7), both, strict=True):
            assert torch.equal(kept, original.transpose(0, 1))
