"""A checkpoint on the disk, read tensor by tensor in one process."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


class Stored:
    """Where each tensor of a checkpoint stands; the files are opened when one is read."""

    def __init__(self, path: Path) -> None:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        self.facts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        """The whole shape and the dtype of each tensor, by name."""
        for name, fact in metadata.state_dict_metadata.items():
            assert isinstance(fact, TensorStorageMetadata)
            self.facts[name] = tuple(fact.size), fact.properties.dtype
        self._parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for index, place in (metadata.storage_data or {}).items():
            self._parts.setdefault(index.fqn, []).append((place.relative_path, tuple(index.offset or ())))

    def read(self, name: str) -> Tensor:
        """A whole tensor, put together of what ranks have written of it."""
        shape, dtype = self.facts[name]
        whole = torch.empty(shape, dtype=dtype)
        for file, offset in self._parts[name]:
            with safe_open(file, framework="pt") as opened:
                part = opened.get_tensor(name)
            slices = tuple(slice(begin, begin + size) for begin, size in zip(offset, part.shape, strict=True))
            whole[slices] = part
        return whole
