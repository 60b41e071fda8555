"""Writing safetensors files: straight from memory, hashed on the way, and on the disk when done."""

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How the format calls them."""
_CHUNK = 2**23
"""Bytes that are hashed while they are still in the processor's cache."""
_UNWRITTEN = 2**26
"""Bytes of a file that may wait in memory for the disk."""


@dataclass(frozen=True)
class Piece:
    """A tensor, or the part of one that a rank holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where it begins in the whole tensor."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    name: str
    bytes: int
    xxh3_128: str
    """The hash of its content, in hexadecimal."""


def write_tensors(path: Path, pieces: Sequence[Piece], read: Callable[[Piece], Tensor]) -> Written:
    """Write a file, which says where in the whole tensors its pieces begin, as torch's reader expects it.

    read: gives a piece's values when they are due, on any device; one at a time is asked for.

    Raises:
        OSError: the disk is full, or can't be written to.
    """
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))  # so that all are aligned
    hashed, size, on_disk = xxhash.xxh3_128(), 0, 0
    with path.open("wb") as file:
        for chunk in _chunks(ordered, read):
            file.write(chunk)
            hashed.update(chunk)
            size += len(chunk)
            if size - on_disk >= _UNWRITTEN:
                _to_disk(file)
                on_disk = size
        _to_disk(file)
    return Written(path.name, size, hashed.hexdigest())


def _to_disk(file: BufferedWriter) -> None:
    """Bring what is written to the disk, and don't keep it: finding memory for it can take longer than writing."""
    file.flush()
    os.fsync(file.fileno())
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _chunks(pieces: Sequence[Piece], read: Callable[[Piece], Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(pieces)
    for piece in pieces:
        tensor = read(piece)
        assert (tuple(tensor.shape), tensor.dtype) == (piece.shape, piece.dtype)
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        content = values.numpy().data
        for begin in range(0, len(content), _CHUNK):
            yield content[begin : begin + _CHUNK]


def _header(pieces: Sequence[Piece]) -> bytes:
    offsets = {piece.name: {"saved_offsets": list(piece.offset)} for piece in pieces}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.bytes
        header[piece.name] = {
            "dtype": _DTYPES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
