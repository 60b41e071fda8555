"""Keys and values of the tokens seen so far, for generation.

B batch, K kv heads, T new tokens, E head_dim.
"""

from torch import Tensor


class LayerCache:
    """One layer's keys and values in buffers of (B, K, capacity, E), made at the first call."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, K, T, E) keys and values; return all of them so far, as views.

        Raises ValueError past the capacity.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens can't hold {end}")
        if self._buffers is None:
            batch, heads, _, width = key.shape
            shape = (batch, heads, self.capacity, width)
            self._buffers = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._buffers
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        self.length = end
        return keys[:, :, :end], values[:, :, :end]


class KeyValueCache:
    """A cache for every layer, of `capacity` tokens each."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length
