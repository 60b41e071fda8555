"""What sees every operator of a step, below autograd and on local tensors, and tells those that count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.ring import OPERATORS

Note = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""note(operator, arguments, named arguments, output)."""

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_INQUIRY = torch.ops.prim.device.default


class Meter(TorchDispatchMode):
    """Tells notes of every operator of a step on fake tensors."""

    def __init__(self, *notes: Note) -> None:
        super().__init__()
        self._notes = notes

    @contextmanager
    def metering(self) -> Iterator[None]:
        """Tell of what is done in here, but for what DTensor tries on whole tensors, to see what comes out."""
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def unseen(*args: Any) -> Any:
            notes, self._notes = self._notes, ()
            try:
                return propagate(*args)
            finally:
                self._notes = notes

        ShardingPropagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[method-assign,assignment]
        try:
            with self:
                yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator is _INQUIRY:
            return operator(*args)
        if DTensor in types:
            return NotImplemented  # it comes back with its local tensors
        kwargs = kwargs or {}
        if operator in OPERATORS:
            with self:
                return OPERATORS[operator](*args, **kwargs)
        # of a fake tensor it would make another one
        output = args[0] if operator is _WAIT else operator(*args, **kwargs)
        for note in self._notes:
            note(operator, args, kwargs, output)
        return output
