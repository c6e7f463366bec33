"""Recognises data that lies in place of a checkpoint's file or of text, by its first bytes. Stdlib only."""

from __future__ import annotations

from pathlib import Path

_NUM_BYTES = 512

_ELSEWHERE = "gptj-dist does not read it: use the original checkpoint, in safetensors or PyTorch's form"
_DOWNLOAD = "download the file again"

_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git-LFS pointer, not the file that it stands for: run `git lfs pull` in the clone, or `gptj-dist download`",
    ),
    (b"GGUF", f"a GGUF file of llama.cpp; {_ELSEWHERE}"),
    *((magic, f"a GGML file of llama.cpp; {_ELSEWHERE}") for magic in (b"fmgg", b"algg")),
    (b"\x89HDF\r\n", f"an HDF5 file of TensorFlow or Keras; {_ELSEWHERE}"),
    (b"\x93NUMPY", f"a NumPy array; {_ELSEWHERE}"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
    (b"BZh", "compressed with bzip2: unpack it"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
)
_OLD_TORCH = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
"""The number that `torch.save` wrote first, pickled, before torch 1.6."""

_FORMS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Beginnings of data that is sent in place of text in UTF-8."""

_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")


def kind_of_file(path: Path) -> str | None:
    """What a file is that cannot be read as what its name promises, and what to do, as the end of a sentence.

    Returns:
        None for a file of no known kind, or one that cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return _kind(file.read(_NUM_BYTES))
    except OSError:
        return None


def known_form(data: bytes) -> str | None:
    """The name of a form of data, other than UTF-8, that is known by its first bytes."""
    return next((name for begin, name in _FORMS.items() if data.startswith(begin)), None)


def _kind(beginning: bytes) -> str | None:
    if not beginning:
        return f"empty: {_DOWNLOAD}"
    for magic, kind in _KINDS:
        if beginning.startswith(magic):
            return kind
    if beginning.lstrip().lower().startswith(_WEB_PAGE):
        return f"a web page, such as a server sends in place of a file that it refuses: {_DOWNLOAD}"
    if _OLD_TORCH in beginning[:32]:
        return "in the format of torch before 1.6, which is not read: load and save it once with torch 1.6 or later"
    if beginning[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if _is_onnx(beginning):
        return f"an ONNX file; {_ELSEWHERE}"
    return None


def _is_onnx(beginning: bytes) -> bool:
    """ONNX has no magic: a protobuf message whose field 1, a small number, precedes the producer's name or a graph."""
    is_message = beginning[0] == 0x08 and beginning[1:2] < b"\x20" and beginning[2:3] in (b"\x12", b"\x3a", b"\x42")
    return is_message and any(word in beginning for word in (b"pytorch", b"onnx", b"graph", b"torch", b"tf2"))
