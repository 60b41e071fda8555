"""Positional encodings. No buffers: what they need is made once per forward and handed to the blocks.

B batch, T sequence, D d_model, E head_dim.
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig, known
from model.cost import Cost
from model.weights import Weight

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each (T, 1, E), the first half of sin negated, in fp32 (fp64 for fp64 activations)."""


class Positions(nn.Module):
    """No encoding, and what every encoding may override."""

    limit: int | None = None
    """Positions that exist; None: any number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def embed(self, x: Tensor, offset: int) -> Tensor:
        """Embeddings (B, T, D) of tokens at positions offset .. offset + T -> (B, T, D)."""
        return x

    def rotation(self, x: Tensor, offset: int) -> Rotation | None:
        """How queries and keys at positions offset .. offset + T turn, for activations x (B, T, D)."""
        return None

    def weights(self) -> dict[str, Weight]:
        return {}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        return Cost()


class Rope(Positions):
    """Rotary positions (Su et al. 2021), dims e and e + E/2 being a pair, as in Llama's published weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.base = config.positional.rope_base
        self.head_dim = known(config.attention.head_dim)

    def rotation(self, x: Tensor, offset: int) -> Rotation:
        angles = _angles(x, offset, self.head_dim, self.base).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def extra_repr(self) -> str:
        return f"base={self.base:g}"


class Sinusoidal(Positions):
    """Fixed sines and cosines added to the embeddings (Vaswani et al. 2017)."""

    def embed(self, x: Tensor, offset: int) -> Tensor:
        angles = _angles(x, offset, x.shape[-1], 10000.0)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return x + table.to(x.dtype)


class Learned(Positions):
    """A learned vector for each position, added to the embeddings (GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.limit = config.max_seq_len
        self.weight = nn.Parameter(torch.zeros(config.max_seq_len, config.d_model))

    def embed(self, x: Tensor, offset: int) -> Tensor:
        end = offset + x.shape[1]
        if end > len(self.weight):
            raise ValueError(
                f"a sequence of {end} tokens goes past the {len(self.weight)} learned positions: shorten it, "
                f"or train with model.max_seq_len={end} or model.positional.encoding=rope"
            )
        return x + self.weight[offset:end]

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "embedding")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        table = config.max_seq_len * config.d_model
        return Cost(parameters=table, embedding=table)

    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.weight.shape)


def _angles(x: Tensor, offset: int, width: int, base: float) -> Tensor:
    """Position times frequency, (T, width / 2), for x (B, T, ...)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(0, width, 2, device=x.device, dtype=dtype)
    places = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=dtype)
    return torch.outer(places, base ** (-steps / width))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (e, e + E/2) of x (B, T, heads, E); in the rotation's dtype, returned in x's."""
    cos, sin = rotation
    wide = x.to(cos.dtype)
    swapped = wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


POSITIONS: dict[str, type[Positions]] = {
    "rope": Rope,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "none": Positions,
}
