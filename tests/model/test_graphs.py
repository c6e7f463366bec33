"""Recorded steps give what steps that are made anew give, however many rows fill them up. Without a GPU a recording is
the computation itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import BLOCK_SIZE_TOKENS, LayerRange, ModelConfig
from gptj_dist.model.block_cache import BlockCache
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.graphs import Compute, GraphRecorder, Record, RecordedSteps, batch_sizes
from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.paged_attention import attend_in_blocks
from tests.kernel_device import DEVICE, IS_INTERPRETED

CONFIG = ModelConfig(97, 2, 32, 2, 4, 64, 40, (0,))
NUM_REQUESTS = 5


def _recorder() -> Record:
    return _compute_again if IS_INTERPRETED else GraphRecorder()


def _compute_again(compute: Compute) -> Compute:
    """As a graph does: into the same memory each time."""
    output = compute()
    return lambda: output.copy_(compute())


class Stage:
    """Some layers with a cache, in which requests have read a few tokens each."""

    def __init__(self, directory: Path, layers: LayerRange, dtype: torch.dtype = torch.float32) -> None:
        with StageTensors(directory, CONFIG, layers) as tensors:
            self.model = StageModel(CONFIG, layers, tensors.read, dtype, DEVICE)
        self.cache = BlockCache(
            layers.num_layers,
            3 * NUM_REQUESTS,
            BLOCK_SIZE_TOKENS,
            CONFIG.context_length,
            CONFIG.num_heads,
            CONFIG.head_dim,
            dtype,
            DEVICE,
        )
        for id_ in range(NUM_REQUESTS):
            self.cache.add(id_)
            self.cache.extend(id_, [3 * id_ + 2, 3 * id_, 3 * id_ + 1])
            prompt = MicroBatch((Span(id_, 0, 0, 14 + id_),), torch.arange(14 + id_))
            self.eager(prompt, self.inputs(14 + id_))

    def inputs(self, num_rows: int) -> Tensor:
        """The same for the same number of rows, on the host."""
        generator = torch.Generator().manual_seed(num_rows)
        if self.model.blank_inputs(1).dim() == 1:
            return torch.randint(CONFIG.vocab_size, (num_rows,), generator=generator)
        return torch.randn(num_rows, CONFIG.d_model, generator=generator)

    def eager(self, batch: MicroBatch, inputs: Tensor) -> Tensor:
        attention = attend_in_blocks(self.cache, batch, self.model.rotary)
        return self.model.compute(inputs.to(DEVICE), attention)


def _batch(rows: list[tuple[int, int]]) -> MicroBatch:
    """Of single rows: of which request, at which position."""
    spans = tuple(Span(request_id, row, position, 1) for row, (request_id, position) in enumerate(rows))
    return MicroBatch(spans, torch.tensor([position for _, position in rows]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, CONFIG, seed=1, init_std=0.3)
    return directory


@pytest.mark.parametrize(
    "layers", [LayerRange(0, 1, 0, 2), LayerRange(0, 2, 0, 1), LayerRange(1, 2, 1, 2)], ids=["whole", "first", "last"]
)
@torch.inference_mode()
def test_rows_that_fill_up_change_nothing(directory: Path, layers: LayerRange) -> None:
    """Any number of rows, in turns, each token twice: made anew, and replayed over it."""
    stage = Stage(directory, layers)
    steps = RecordedSteps(stage.model, stage.cache, batch_sizes(NUM_REQUESTS), _recorder())
    kept = []
    for num_rows in (3, 1, 5, 2, 4):
        batch = _batch([(id_, 14 + id_) for id_ in range(num_rows)])
        expected = stage.eager(batch, stage.inputs(num_rows))
        assert steps.has(batch)
        kept.append((steps(batch, stage.inputs(num_rows)), expected))
    for ours, expected in kept:  # a result stays when others have been computed
        assert ours.shape == expected.shape
        assert float((ours - expected).abs().max()) < 1e-5


@torch.inference_mode()
def test_rows_of_one_request_are_replayed_as_single_rows(directory: Path) -> None:
    stage = Stage(directory, LayerRange(0, 1, 0, 2))
    steps = RecordedSteps(stage.model, stage.cache, [8], _recorder())
    batch = MicroBatch((Span(0, 0, 14, 4), Span(1, 4, 15, 1)), torch.tensor([14, 15, 16, 17, 15]))
    expected = stage.eager(batch, stage.inputs(5))
    assert not steps.has(batch)
    ours = steps(batch.row_by_row(), stage.inputs(5))
    assert float((ours - expected).abs().max()) < 1e-5


@torch.inference_mode()
def test_recording_writes_to_no_request(directory: Path) -> None:
    stage = Stage(directory, LayerRange(0, 1, 0, 2))
    before = [part[:-1].clone() for layer in range(2) for part in stage.cache.layer(layer)]
    RecordedSteps(stage.model, stage.cache, [4], _recorder())
    after = [part[:-1] for layer in range(2) for part in stage.cache.layer(layer)]
    assert all(torch.equal(old.nan_to_num(7), new.nan_to_num(7)) for old, new in zip(before, after, strict=True))


@torch.inference_mode()
def test_only_single_rows_and_not_too_many_are_recorded(directory: Path) -> None:
    stage = Stage(directory, LayerRange(0, 1, 0, 2))
    steps = RecordedSteps(stage.model, stage.cache, [1, 2], _compute_again)
    assert steps.has(_batch([(0, 14), (1, 15)]))
    assert not steps.has(_batch([(0, 14), (1, 15), (2, 16)]))
    assert not steps.has(MicroBatch((Span(0, 0, 14, 2),), torch.tensor([14, 15])))


@pytest.mark.parametrize(
    ("max_batch_size", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 4]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 16]),
        (64, [1, 2, 4, 8, 16, 32, 48, 64]),
        (65, [1, 2, 4, 8, 16, 32, 48, 64, 80]),
    ],
)
def test_sizes_reach_the_largest_micro_batch_and_stop_there(max_batch_size: int, expected: list[int]) -> None:
    assert batch_sizes(max_batch_size) == expected
