"""Tensors of a layout, copied into the host's memory while the loop goes on with what doesn't change them."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from parallel.gradients import local


class HostCopy:
    """Copies in a thread, into memory that it keeps: finding some takes longer than copying."""

    def __init__(self, thread: Executor) -> None:
        self._thread = thread
        on_cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(on_cuda, False, False, False))
        self._stream = torch.cuda.Stream() if on_cuda else None  # beside the one that computes

    def begin(self, tensors: Mapping[str, Tensor]) -> "Future[dict[str, Tensor]]":
        """Begin to copy the tensors as they are now; they mustn't change until that is done.

        The copy of a DTensor says the same of its place in the whole.
        """
        computed = torch.cuda.current_stream().record_event() if self._stream is not None else None
        shards = {name: local(tensor).detach() for name, tensor in tensors.items()}

        def copy() -> dict[str, Tensor]:
            with torch.cuda.stream(self._stream):
                if self._stream is not None and computed is not None:
                    self._stream.wait_event(computed)
                copied = self._stager.stage(shards)
            assert isinstance(copied, dict)
            return {name: _placed(copied[name], tensor) for name, tensor in tensors.items()}

        return self._thread.submit(copy)

    def close(self) -> None:
        """Let go of the memory."""
        self._stager.close()


def _placed(copied: Tensor, tensor: Tensor) -> Tensor:
    """What was copied of a tensor's shard, in the shard's place; `from_local` would bring it back to the device."""
    if not isinstance(tensor, DTensor):
        return copied
    return DTensor(copied, tensor._spec, requires_grad=False)
