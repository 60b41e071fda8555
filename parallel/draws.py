"""Random draws, such as dropout's, of ranks that draw alike elsewhere but hold different activations here."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.twin import is_twin


class OwnDraws:
    """From one module's entrance to another's exit, in training, a rank's draws are its own.

    They start from a draw that all ranks make alike, so that what recomputes activations from the random state
    saved with them draws the same again; and the others' draws go on afterwards as if none had been made.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank = group.rank()
        self._before: tuple[Tensor, Tensor | None] | None = None

    def between(self, first: nn.Module, last: nn.Module) -> None:
        """Register on the modules, either of which may be the other."""
        first.register_forward_pre_hook(self._begin)
        last.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training or is_twin(args[0]):
            return
        seed = int(torch.randint(2**62, ()))
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._before = torch.get_rng_state(), cuda
        torch.manual_seed(seed + self._rank)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._before is None:
            return
        host, device = self._before
        self._before = None
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)
