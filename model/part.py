"""A part of all sequences of a batch, where one process works on it and others on the rest."""

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """The places start .. stop of sequences of `length` tokens."""

    start: int
    stop: int
    length: int

    def of(self, sequences: Tensor) -> Tensor:
        """(B, length, ...) -> (B, stop - start, ...)."""
        return sequences[:, self.start : self.stop]
