"""What generation keeps of the tokens seen so far.

B batch, K kv heads, H heads, T new tokens, E head_dim, W width of values.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.masks import reach


class KeyValues:
    """One layer's keys and values in buffers of (B, K, size, E), made at the first call.

    With a reach, a query sees that many keys up to itself, and no more than twice as many are kept.
    """

    def __init__(self, capacity: int, reach: int | None = None) -> None:
        self.capacity = capacity
        self.length = 0
        self._reach = capacity if reach is None else min(reach, capacity)
        self._size = capacity if reach is None else min(capacity, 2 * reach)
        self._held = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def visible(self, new: int) -> int:
        """How many keys `append` returns for so many new tokens: those that the first of them may see, and on."""
        return min(self.length + new, self._reach - 1 + new)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, K, T, E) keys and values; return those that the new tokens may see, the last ones.

        Raises ValueError past the capacity.
        """
        new = key.shape[2]
        visible, end = self.visible(new), self.length + new
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens can't hold {end}")
        if self._buffers is None:
            self._buffers = self._buffer(key), self._buffer(value)
        keys, values = (
            self._add(buffer, part) for buffer, part in zip(self._buffers, (key, value), strict=True)
        )
        fits = self._held + new <= self._size
        self._held = self._held + new if fits else min(self._held + new, self._reach - 1)
        self.length = end
        return keys[:, :, -visible:], values[:, :, -visible:]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, (N,) int64."""
        if self._buffers is not None:
            keys, values = self._buffers
            self._buffers = keys[rows], values[rows]

    def _buffer(self, part: Tensor) -> Tensor:
        batch, heads, _, width = part.shape
        return part.new_empty((batch, heads, self._size, width))

    def _add(self, buffer: Tensor, part: Tensor) -> Tensor:
        """All that is held and the new part, as a view of the buffer where it fits in."""
        end = self._held + part.shape[2]
        if end <= self._size:
            buffer[:, :, self._held : end] = part
            return buffer[:, :, :end]
        everything = torch.cat((buffer[:, :, : self._held], part), dim=2)
        kept = min(end, self._reach - 1)
        buffer[:, :, :kept] = everything[:, :, end - kept :]
        return everything


class RunningState:
    """One layer's sums of linear attention: of the numerator (B, H, E, W) and the denominator (B, H, E, 1)."""

    def __init__(self) -> None:
        self.length = 0
        self.sums: tuple[Tensor, Tensor] | None = None

    def visible(self, new: int) -> int:
        """All tokens so far, through the sums."""
        return self.length + new

    def replace(self, sums: tuple[Tensor, Tensor], new: int) -> None:
        """The sums after so many new tokens."""
        self.sums = sums
        self.length += new

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, (N,) int64."""
        if self.sums is not None:
            above, below = self.sums
            self.sums = above[rows], below[rows]


LayerCache = KeyValues | RunningState


class KeyValueCache:
    """A cache for every layer, of `capacity` tokens each."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        attention = config.attention
        self.layers: list[LayerCache] = [
            RunningState() if attention.variant == "linear" else KeyValues(capacity, reach(attention))
            for _ in range(config.num_layers)
        ]
        self.padding: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length

    def keys(self, new: int) -> range:
        """Places of the keys that so many new tokens will be given."""
        end = self.length + new
        return range(end - self.layers[0].visible(new), end)

    def add_padding(self, padding: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Which of all tokens are padding, (B, S) bool, given that of the new tokens (B, T); None: none are."""
        if padding is None and self.padding is None:
            return None
        if self.padding is None:
            self.padding = tokens.new_zeros((len(tokens), self.length), dtype=torch.bool)
        new = torch.zeros_like(tokens, dtype=torch.bool) if padding is None else padding
        self.padding = torch.cat((self.padding, new), dim=1)
        return self.padding

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows of the batch (N,) int64, in this order, of which some may come more than once."""
        for layer in self.layers:
            layer.reorder(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]
