"""The memory that tensors take in the course of a step, and of what its peak is made."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard  # noqa: F401  (registers its operators)
from torch.utils._pytree import tree_leaves

OTHERS = "activations"
"""The part of what is said to belong to no other."""

STEADY = ("weights", "optimizer")

BUFFERS = (torch.ops.fsdp.all_gather_copy_in.default, torch.ops.c10d._reduce_scatter_base_.default)
"""What takes and fills buffers of FSDP2's collectives."""

TO_REDUCE = torch.ops.fsdp.chunk_cat.default
"""What takes whole gradients."""

SPLIT = torch.ops.fsdp.split_with_sizes_copy.default
"""What takes gathered weights apart; of those not sharded by rows into copies."""

BINARY = tuple(getattr(torch.ops.aten, name).Tensor for name in ("add", "add_", "mul", "mul_", "sub", "sub_"))
"""What on a CPU widens the narrower of two tensors before it starts."""

MAKERS = {"_TokenLossSumBackward": "logits", "EmbeddingBackward0": "gathered"}
"""To which part belongs what a backward makes, by its name."""


class MemoryLog:
    """Notes when storages come, change their size and go; to which part each belongs may be said later."""

    def __init__(self, whole_gradients: str) -> None:
        """whole_gradients: the part to which these belong before they are reduced."""
        self._whole_gradients = whole_gradients
        self._part: str | None = None
        self._parts: list[str] = []  # of each storage, by its number
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []  # number of a storage, bytes that it grows by

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """An operator's outputs, of which some are new."""
        for storage in _storages(output):
            self._number(storage)
        if operator in BUFFERS:
            self._mark_passing("gathered", args)
        elif operator in BINARY:
            self._widened(*args[:2])
        elif operator is SPLIT:
            self._mark_passing("gathered", kwargs)
        elif operator is TO_REDUCE:
            self._mark_passing(self._whole_gradients, args)
            self._mark_passing("gathered", kwargs)

    def mark(self, part: str, tree: Any) -> None:
        """Say that tensors, noted before or not, belong to a part."""
        for storage in _storages(tree):
            self._parts[self._number(storage)] = part

    def _mark_passing(self, part: str, tree: Any) -> None:
        """The same of those that don't stay."""
        self.mark(part, [t for t in tree_leaves(tree) if isinstance(t, Tensor) and not self._stays(t)])

    def _stays(self, tensor: Tensor) -> bool:
        return self._parts[self._number(tensor.untyped_storage())] in STEADY

    def _widened(self, one: Any, other: Any) -> None:
        """A copy that an operator makes inside, and lets go."""
        tensors = [each for each in (one, other) if isinstance(each, Tensor) and each.dim()]
        wide = max((each.itemsize for each in tensors), default=0)
        for each in tensors:
            if each.itemsize < wide:
                number = len(self._parts)
                self._parts.append(self._part or _part_by_maker())
                self._events += [(number, each.numel() * wide), (number, -each.numel() * wide)]
                self._sizes.append(0)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is new in here belongs to a part."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def resizing(self, part: str) -> Iterator[None]:
        """Note what is resized in here, by FSDP2, which so frees and takes memory for gathered weights: a part."""
        resize: Callable[[torch.UntypedStorage, int], Any] = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            number = self._number(storage)
            self._parts[number] = part
            self._resized(number, size)

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]

    def peak(self) -> dict[str, int]:
        """Bytes by part, when they were most together."""
        now: dict[str, int] = defaultdict(int)
        total = most = 0
        at_peak: dict[str, int] = {}
        for number, growth in self._events:
            now[self._parts[number]] += growth
            total += growth
            if total > most:
                most, at_peak = total, dict(now)
        return at_peak

    def _number(self, storage: torch.UntypedStorage) -> int:
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number = len(self._parts)
        self._parts.append(self._part or _part_by_maker())
        self._sizes.append(0)
        self._alive[address] = number, weakref.ref(storage, lambda _: self._freed(address, number))
        self._resized(number, storage.nbytes())
        return number

    def _resized(self, number: int, size: int) -> None:
        if size != self._sizes[number]:
            self._events.append((number, size - self._sizes[number]))
            self._sizes[number] = size

    def _freed(self, address: int, number: int) -> None:
        del self._alive[address]
        self._resized(number, 0)


def _part_by_maker() -> str:
    node = torch._C._current_autograd_node()
    return OTHERS if node is None else MAKERS.get(node.name(), OTHERS)


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
