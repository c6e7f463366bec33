"""Files of `torch.save`: read as torch reads them, and never run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptj_dist.checkpoint.index import check_checkpoint, expected_tensors, read_header, read_model_config
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError

CONFIG = ModelConfig(40, 4, 16, 2, 4, 64, 32, (0,))
WHOLE = LayerRange(0, 1, 0, 4)
FIRST, LAST = LayerRange(0, 2, 0, 2), LayerRange(1, 2, 2, 4)

State = dict[str, torch.Tensor]


def _as_pickle(directory: Path, change: Callable[[State], Any] = lambda state: state, **how: Any) -> State:
    """Turns the safetensors in a directory into a `pytorch_model.bin`; gives what the file should be read as."""
    write_checkpoint(directory, CONFIG, legacy_buffers=True)
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(change(dict(state)), directory / "pytorch_model.bin", **how)
    return {name: state[name] for name in expected_tensors(CONFIG, WHOLE)}


def _read_stage(directory: Path, layers: LayerRange = WHOLE) -> State:
    with StageTensors(directory, CONFIG, layers) as tensors:
        read = {name: torch.full(shape, torch.nan) for name, shape in expected_tensors(CONFIG, layers).items()}
        for name, out in read.items():
            tensors.read(name, out)
    return read


def _transposed(state: State) -> State:
    return {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in state.items()}


def _in_one_storage(state: State) -> State:
    flat = torch.cat([torch.zeros(3), *[t.float().reshape(-1) for t in state.values()]])
    parts = flat[3:].split_with_sizes([t.numel() for t in state.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(state.items(), parts, strict=True)}


def _with_metadata(state: State) -> State:
    ordered: Any = OrderedDict(state)
    ordered._metadata = OrderedDict({"": {"version": 1}, "transformer.wte": {"version": 1}})
    return ordered  # type: ignore[no-any-return]


FORMS: dict[str, tuple[Callable[[State], Any], dict[str, Any]]] = {
    "a zip": (lambda state: state, {}),
    "an ordered dict with versions": (_with_metadata, {}),
    "parameters": (lambda state: {n: torch.nn.Parameter(t, t.is_floating_point()) for n, t in state.items()}, {}),
    "a younger pickle protocol": (lambda state: state, {"pickle_protocol": 4}),
    "transposed tensors": (_transposed, {}),
    "views of one storage": (_in_one_storage, {}),
    "a list with the options of a command": (lambda state: [Namespace(lr=0.1, seeds=[1], name=None), state, 3], {}),
    "names without prefix": (lambda state: {n.removeprefix("transformer."): t for n, t in state.items()}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pickle_reads_as_it_was_saved(tmp_path: Path, form: str) -> None:
    change, how = FORMS[form]
    truth = _as_pickle(tmp_path, change, **how)

    check_checkpoint(tmp_path, CONFIG)
    read = _read_stage(tmp_path, FIRST) | _read_stage(tmp_path, LAST)

    assert read.keys() == truth.keys()
    assert all(torch.equal(read[name], truth[name]) for name in truth)


def _column_slices(state: State) -> State:
    return {name: torch.cat([t, t], dim=1)[:, : t.shape[1]] if t.dim() == 2 else t for name, t in state.items()}


@pytest.mark.parametrize("change", [_transposed, _column_slices])
def test_tensor_with_strides_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[State], State]
) -> None:
    monkeypatch.setattr("gptj_dist.checkpoint.loader.STAGING_BYTES", 1000)
    truth = _as_pickle(tmp_path, change)
    read = _read_stage(tmp_path)
    assert all(torch.equal(read[name], truth[name]) for name in truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_pickles_are_cast_while_they_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    truth = _as_pickle(tmp_path, lambda state: {n: t.to(dtype) if "bias" not in n else t for n, t in state.items()})
    read = _read_stage(tmp_path)
    assert all(torch.equal(read[n], t.to(dtype).float() if "bias" not in n else t) for n, t in truth.items())


def test_sharded_pickle_opens_only_the_files_of_its_stage(tmp_path: Path) -> None:
    truth = _as_pickle(tmp_path)
    names = list(truth)
    shards = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, part in shards.items():
        torch.save({name: truth[name] for name in part}, tmp_path / file)
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))

    check_checkpoint(tmp_path, CONFIG)
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    assert all(torch.equal(tensor, truth[name]) for name, tensor in _read_stage(tmp_path, LAST).items())
    with pytest.raises(CheckpointError, match=r"lacks pytorch_model-00001-of-00002\.bin"):
        check_checkpoint(tmp_path, CONFIG)


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")

    truth = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, truth[name]) for name, tensor in _read_stage(tmp_path, LAST).items())


def test_tied_pickle_may_hold_the_embedding_under_both_names(tmp_path: Path) -> None:
    def tie(state: State) -> State:
        return {**state, "lm_head.weight": state["transformer.wte.weight"]}

    truth = _as_pickle(tmp_path, tie)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))

    model = read_model_config(tmp_path)
    assert model.has_tied_embeddings
    with StageTensors(tmp_path, model, LAST) as tensors:
        tensors.read("transformer.wte.weight", head := torch.empty(model.vocab_size, model.d_model))
    assert torch.equal(head, truth["transformer.wte.weight"])


def test_dtype_is_taken_from_the_weights_where_the_config_does_not_tell_it(tmp_path: Path) -> None:
    _as_pickle(tmp_path, lambda state: {name: t.to(torch.float16) for name, t in state.items()})
    config = tmp_path / "config.json"
    assert read_model_config(tmp_path).dtype == "float32"
    config.write_text(config.read_text().replace('"dtype": "float32",', ""))

    assert read_model_config(tmp_path).dtype == "float16"


def test_stage_reads_hardly_more_bytes_than_its_own(tmp_path: Path) -> None:
    big = ModelConfig(2000, 8, 256, 2, 4, 1024, 32, (0,))
    write_checkpoint(tmp_path, big, legacy_buffers=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for stage in range(4):
        layers = LayerRange(stage, 4, 2 * stage, 2 * stage + 2)
        shapes = expected_tensors(big, layers)
        before = _bytes_read()
        with StageTensors(tmp_path, big, layers) as tensors:
            for name, shape in shapes.items():
                tensors.read(name, torch.empty(shape, dtype=torch.bfloat16))
        own_bytes = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
        assert own_bytes <= _bytes_read() - before <= 1.05 * own_bytes


def _bytes_read() -> int:
    """Bytes that this process has read, whether from the disk or from the page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


# Refusing


class Exploit:
    """What `pickle.load` would run."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call[0], self._call[1:]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, "touch {proof}"), "posix.system"),
        ((subprocess.Popen, ["touch", "{proof}"]), "subprocess.Popen"),
        ((eval, "open('{proof}', 'w')"), "builtins.eval"),
        ((getattr, "os", "system"), "builtins.getattr"),
        ((torch.load, "{proof}"), "torch.serialization.load"),
    ],
)
def test_pickle_that_would_run_code_is_refused_by_name_and_not_run(
    tmp_path: Path, call: tuple[Any, ...], name: str
) -> None:
    proof = tmp_path / "proof"
    armed = [str(part).format(proof=proof) if isinstance(part, str) else part for part in call]
    exploit = Exploit(*armed)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"transformer.wte.weight": exploit}, 3))

    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin is refused.* run code.*{name}"):
        read_header(tmp_path / "pytorch_model.bin")
    assert not proof.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02cbuiltins\nexec\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02(cos\nsystem\no.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
        b"\x80\x02cargparse\nNamespace\nK\x01\x85\x81.",
    ],
)
def test_every_instruction_that_calls_or_imports_is_refused(tmp_path: Path, code: bytes) -> None:
    pickletools.dis(code.replace(b"o.", b"0.") if b"o." in code else code, io.StringIO())
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", code)

    with pytest.raises(CheckpointError, match="run code"):
        read_header(tmp_path / "x.bin")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_pickle_is_refused_with_the_bytes_that_it_has(tmp_path: Path, share: float) -> None:
    _as_pickle(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    size = int(path.stat().st_size * share)
    os.truncate(path, size)

    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin is truncated.* it has {size}( bytes)?$"):
        read_header(path)


def test_pickle_that_was_cut_off_while_downloading_says_how_much_is_needed(tmp_path: Path) -> None:
    truth = _as_pickle(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    least = sum(tensor.nbytes for tensor in truth.values())

    with pytest.raises(CheckpointError, match=r"need|take") as error:
        read_header(path)
    assert max(int(word) for word in str(error.value).replace(";", " ").split() if word.isdigit()) >= least


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"transformer.wte.weight": torch.zeros(2)}}, "'model' is no tensor"),
        ([torch.zeros(2)], "it holds a list"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2)}], "it holds a list"),
        ({"epoch": 3}, "'epoch' is no tensor"),
    ],
)
def test_pickle_of_something_else_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "x.bin")

    with pytest.raises(CheckpointError, match=reason):
        read_header(tmp_path / "x.bin")


def test_tensor_of_more_numbers_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"transformer.wte.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "x.bin")

    with pytest.raises(CheckpointError, match="uses its 1 numbers several times"):
        read_header(tmp_path / "x.bin")


def test_compressed_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(1_000_000))

    with pytest.raises(CheckpointError, match="compressed"):
        read_header(tmp_path / "x.bin")


def test_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")

    with pytest.raises(CheckpointError, match="not one of PyTorch's"):
        read_header(tmp_path / "x.bin")


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_file_of_torch_before_1_6_is_refused_with_the_cure(tmp_path: Path, form: str, protocol: int) -> None:
    state = {"transformer.wte.weight": torch.zeros(40, 16)}
    torch.save(state, tmp_path / form, pickle_protocol=protocol, _use_new_zipfile_serialization=False)

    with pytest.raises(
        CheckpointError, match=rf"{form} is in the format of torch before 1\.6, .*: load and save it once"
    ):
        read_header(tmp_path / form)


def test_pickle_without_a_zip_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": Exploit(os.system, f"touch {proof}")}, 2))

    with pytest.raises(CheckpointError, match=r"does not begin as a file of torch\.save"):
        read_header(tmp_path / "x.bin")
    assert not proof.exists()
