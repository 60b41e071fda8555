"""What sees every operator of a step, below autograd and on local tensors, and tells those that count."""

from collections.abc import Callable
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.ring import OPERATORS

Note = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""note(operator, arguments, named arguments, output)."""

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_INQUIRY = torch.ops.prim.device.default


class Meter(TorchDispatchMode):
    """Tells notes of every operator of a step on fake tensors."""

    def __init__(self, fake: FakeTensorMode, *notes: Note) -> None:
        super().__init__()
        self._fake = fake
        self._notes = notes

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
        # DTensor tries operators on whole tensors, in a mode of its own, to see what comes out
        if active_fake_mode() is self._fake:
            for note in self._notes:
                note(operator, args, kwargs, output)
        return output
