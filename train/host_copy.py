"""Tensors of a layout, copied into the host's memory while the loop goes on with what doesn't change them."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.gradients import local


class HostCopy:
    """Copies in a thread, into memory that it keeps: finding some takes longer than copying."""

    def __init__(self, thread: Executor) -> None:
        self._thread = thread
        self._memory: dict[str, Tensor] = {}
        # beside the one that computes
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

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
                copied = self._copy(shards)
            if self._stream is not None:
                self._stream.synchronize()
            return {name: _placed(copied[name], tensor) for name, tensor in tensors.items()}

        return self._thread.submit(copy)

    def _copy(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, shard in shards.items():
            kept = self._memory.get(name)
            if kept is None or (kept.shape, kept.dtype) != (shard.shape, shard.dtype):
                # only to pages that are locked do copies go beside what is computed
                kept = torch.empty_like(shard, device="cpu", pin_memory=self._stream is not None)
                self._memory[name] = kept
            kept.copy_(shard, non_blocking=True)
        return {name: self._memory[name] for name in shards}

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.clear()


def _placed(copied: Tensor, tensor: Tensor) -> Tensor:
    """What was copied of a tensor's shard, in the shard's place; `from_local` would bring it back to the device."""
    if not isinstance(tensor, DTensor):
        return copied
    return DTensor(copied, tensor._spec, requires_grad=False)
