"""A hash of which sequences were in which step's global batch, by which two runs' orders of data are compared."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

NOTHING_READ = "0" * 16


class OrderDigest:
    """The digest after each step: the sum of a hash of (step, id) for every sequence so far, modulo 2**64.

    The order within a global batch doesn't matter, nor how it is shared out to ranks; a sequence in another step, left
    out or read twice does. Sums need no ranks in any order, so they are left to the device.
    """

    def __init__(
        self,
        sum_over_data: Callable[[Tensor], Tensor],
        device: torch.device,
        before: str = NOTHING_READ,
    ) -> None:
        """sum_over_data: in place, over the ranks that read different data. before: where a resumed run goes on."""
        self._sum_over_data = sum_over_data
        self._share = torch.zeros((), dtype=torch.int64, device=device)
        self.go_on_from(before)

    def go_on_from(self, before: str) -> None:
        """Go on from a digest of before, all ranks together."""
        self.value = before
        """After the last step that was read."""
        self._before = int(before, 16)
        self._share.zero_()

    def add(self, step: int, ids: Tensor) -> Tensor:
        """Add this rank's sequences of a step; ids: (B,) int64, on the host. All ranks call it together.

        Returns all ranks' sum so far, () int64 on the device, for `read`.
        """
        self._share += _hashes(step, ids.numpy().astype(np.uint64)).sum().view(np.int64).item()
        return self._sum_over_data(self._share.clone())

    def read(self, total: Tensor) -> str:
        """The digest after the step that `total` was returned for: 16 hexadecimal digits. The device is waited for."""
        self.value = f"{(self._before + int(total.item())) % 2**64:016x}"
        return self.value


def _hashes(step: int, ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each (step, id), (B,) uint64."""
    return _mixed(ids + _mixed(np.array([step], np.uint64)))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
