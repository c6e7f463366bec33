"""Tables list each request's blocks, in order, and no one else's."""

from __future__ import annotations

import random

import torch

from gptj_dist.model.block_cache import SCRATCH_REQUEST, BlockCache
from gptj_dist.model.inputs import Span

NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS = 30, 4, 41


def _cache(dtype: torch.dtype = torch.float32) -> BlockCache:
    return BlockCache(2, NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS, 3, 5, dtype, torch.device("cpu"))


def test_a_random_walk_lists_what_each_request_was_given() -> None:
    chooser = random.Random(0)
    cache = _cache()
    free = list(range(NUM_BLOCKS))
    held: dict[int, list[int]] = {}
    for step in range(200):
        cache.add(step)
        held[step] = []
        id_ = chooser.choice(list(held))
        num_new = chooser.randint(1, 3)
        if num_new > len(free) or (len(held[id_]) + num_new) * BLOCK_SIZE > MAX_TOKENS + 3:
            cache.release(id_)
            free += held.pop(id_)
            chooser.shuffle(free)
        else:
            new = [free.pop() for _ in range(num_new)]
            cache.extend(id_, tuple(new))
            held[id_] += new
        tables = cache.tables([Span(id_, 0, 0, len(blocks) * BLOCK_SIZE) for id_, blocks in held.items()])
        assert tables.shape == (len(held), -(-MAX_TOKENS // BLOCK_SIZE))
        assert [row[: len(blocks)] for row, blocks in zip(tables.tolist(), held.values(), strict=True)] == list(
            held.values()
        )


def test_nobodys_request_is_always_there_and_its_block_is_nobodys() -> None:
    cache = _cache()
    assert cache.tables([Span(SCRATCH_REQUEST, 0, 0, 1)]).tolist()[0][0] == NUM_BLOCKS
    assert cache.layer(1)[0].shape == (NUM_BLOCKS + 1, 3, BLOCK_SIZE, 5)


def test_layers_keys_and_values_share_nothing() -> None:
    cache = _cache(torch.float16)
    parts = [part for layer in range(2) for part in cache.layer(layer)]
    for value, part in enumerate(parts):
        part.fill_(value)
    assert [bool((part == value).all()) for value, part in enumerate(parts)] == [True] * 4
    assert {part.dtype for part in parts} == {torch.float16}


def test_a_copy_fills_the_blocks_that_are_not_held_in_common_and_no_others() -> None:
    cache = _cache()
    parts = [part for layer in range(2) for part in cache.layer(layer)]
    for seed, part in enumerate(parts):
        part.normal_(generator=torch.Generator().manual_seed(seed))
    before = [part.clone() for part in parts]
    cache.add(0)
    cache.extend(0, (7, 3, 11, 2))
    cache.add(1)
    cache.extend(1, (7, 3))
    cache.extend(1, (5, 9))
    cache.copy(0, 1, 2 * BLOCK_SIZE + 1)
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part[5], was[11])
        others = [block for block in range(NUM_BLOCKS) if block != 5]
        assert torch.equal(part[others], was[others])


def test_layers_join_and_leave_with_what_is_in_them() -> None:
    cache = _cache()
    first, second = cache.layer(0), cache.layer(1)
    other = cache.new_layer()
    cache.insert_layer(2, other)
    assert cache.remove_layer(0) is first
    assert (cache.num_layers, cache.layer(0), cache.layer(1)) == (2, second, other)
    assert other.block_bytes == 2 * 3 * BLOCK_SIZE * 5 * 4


def test_a_watch_notes_what_may_be_there_and_what_is_written_since() -> None:
    cache = _cache()
    cache.add(0)
    cache.extend(0, (7, 3, 11))
    cache.note_written(0, 0, 5)  # nobody watches
    assert not cache.is_watched
    changed = cache.watch()
    assert changed.take() == [3, 7, 11, NUM_BLOCKS]
    assert changed.take() == []
    cache.note_written(0, BLOCK_SIZE - 1, BLOCK_SIZE + 1)
    assert changed.take() == [3, 7]
    cache.note_written(0, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1)
    cache.add(1)
    cache.extend(1, (5,))
    cache.copy(0, 1, 2)
    assert changed.take() == [5, 11]
    cache.release(0)
    assert set(cache.watch().take()) == {3, 5, 7, 11, NUM_BLOCKS}  # others may begin with them
    cache.unwatch()
    assert not cache.is_watched
