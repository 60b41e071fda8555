"""Positional encodings. No buffers: what they need is made once per forward and handed to the blocks.

B batch, T sequence, D d_model, H heads, E head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.cost import Cost
from model.kernels import Bias
from model.positional_config import rope_width
from model.rope import Rotation, angles, geometric_frequencies, make_rotation
from model.weights import Weight


class Positions(nn.Module):
    """No encoding, and what every encoding may override."""

    limit: int | None = None
    """Positions that exist; None: any number."""
    heads: range
    """The query heads that a bias is made for: all of the model's, unless set otherwise."""
    part_heads: range
    """Those of them where the tokens are a part of their sequences, which other heads' processes hold too."""
    first_row: int = 0
    """The head that the first row of a weight with a row for each head belongs to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = self.part_heads = range(config.attention.num_heads)

    def embed(self, x: Tensor, offset: int, places: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D) of tokens at positions offset .. offset + T, or at places (B, T) -> (B, T, D)."""
        return x

    def rotation(self, x: Tensor, offset: int) -> Rotation | None:
        """How queries and keys at positions offset .. offset + T turn, for activations x (B, T, D)."""
        return None

    def bias(self, x: Tensor) -> Bias | None:
        """What is added to the scores, by head and distance, on the device of x."""
        return None

    def weights(self) -> dict[str, Weight]:
        return {}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        return Cost()


class Rope(Positions):
    """Rotary positions (Su et al. 2021), dims e and e + R/2 being a pair, as in Llama's published weights.

    With complex attention the phases of all head_dim numbers turn.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config.positional
        self.width = rope_width(config.positional, config.attention)

    def rotation(self, x: Tensor, offset: int) -> Rotation:
        return make_rotation(x, offset, self.width, self.config)

    def extra_repr(self) -> str:
        scaling = self.config.rope_scaling
        scaled = "" if scaling is None else f", {scaling.type} scaling by {scaling.factor:g}"
        return f"base={self.config.rope_base:g}, width={self.width}{scaled}"


class Alibi(Positions):
    """A penalty on the scores that grows with the distance, in each head at its own rate (Press et al. 2022)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.num_heads = config.attention.num_heads

    def bias(self, x: Tensor) -> Bias:
        slopes = torch.tensor([alibi_slope(head, self.num_heads) for head in self.heads], device=x.device)
        first = self.heads.start

        def penalty(head: Tensor, distance: Tensor) -> Tensor:
            return -slopes[head - first] * distance.abs()

        return penalty


def alibi_slope(head: int, num_heads: int) -> float:
    """2 ** (-8 (head + 1) / n) for n heads, n a power of 2; the others are every second one of twice as many."""
    power = 2 ** int(math.log2(num_heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return alibi_slope(2 * (head - power), 2 * power)


class Relative(Positions):
    """A learned number for each head and bucket of distances, shared by all layers (Raffel et al. 2020).

    Half of the buckets hold one distance each, the others distances up to a maximum, in a geometric series.
    Bidirectional: half of all are for later keys.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.max_distance = config.positional.relative_max_distance
        self.bidirectional = config.attention.mask_type == "bidirectional"
        self.weight = nn.Parameter(
            torch.zeros(config.attention.num_heads, config.positional.relative_buckets)
        )

    def bias(self, x: Tensor) -> Bias:
        weight, first = self.weight, self.first_row

        def learned(head: Tensor, distance: Tensor) -> Tensor:
            bucket = relative_bucket(distance, weight.shape[1], self.max_distance, self.bidirectional)
            return weight[head - first, bucket]

        return learned

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("per_head", "embedding")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        table = config.attention.num_heads * config.positional.relative_buckets
        return Cost(parameters=table, embedding=table)


def relative_bucket(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of key's place - query's place, integers of any shape."""
    first: Tensor | int = 0
    if bidirectional:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # near distances don't take this branch, and the logarithm of 0 has no bucket
    ratio = (distance.clamp(min=1) / exact).log() / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class Sinusoidal(Positions):
    """Fixed sines and cosines added to the embeddings (Vaswani et al. 2017)."""

    def embed(self, x: Tensor, offset: int, places: Tensor | None = None) -> Tensor:
        frequencies = geometric_frequencies(x, x.shape[-1], 10000.0)
        turns = angles(x, offset, frequencies) if places is None else places.unsqueeze(-1) * frequencies
        table = torch.stack((turns.sin(), turns.cos()), dim=-1).flatten(-2)
        return x + table.to(x.dtype)


class Learned(Positions):
    """A learned vector for each position, added to the embeddings (GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.limit = config.max_seq_len
        self.weight = nn.Parameter(torch.zeros(config.max_seq_len, config.d_model))

    def embed(self, x: Tensor, offset: int, places: Tensor | None = None) -> Tensor:
        end = offset + x.shape[1]
        if end > len(self.weight):
            raise ValueError(
                f"a sequence of {end} tokens goes past the {len(self.weight)} learned positions: shorten it, "
                f"or train with model.max_seq_len={end} or model.positional.encoding=rope"
            )
        return x + (self.weight[offset:end] if places is None else F.embedding(places, self.weight))

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "embedding")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        table = config.max_seq_len * config.d_model
        return Cost(parameters=table, embedding=table)

    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.weight.shape)


POSITIONS: dict[str, type[Positions]] = {
    "rope": Rope,
    "alibi": Alibi,
    "relative": Relative,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "none": Positions,
}


def places_in_documents(
    length: int, offset: int, documents: Tensor | None, padding: Tensor | None
) -> Tensor | None:
    """Positions (B, T) of the last `length` tokens where documents (B, S) or padding (B, S) make them differ
    from offset .. offset + T, else None.

    Padding has no position of its own, and a document, a run of one id, starts at 0.
    """
    if documents is None and padding is None:
        return None
    known = padding if documents is None else documents
    assert known is not None
    real = torch.ones_like(known, dtype=torch.long) if padding is None else (~padding).long()
    places = real.cumsum(1) - real
    if documents is not None:
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        places = places - (places * starts).cummax(1).values
    return places[:, offset : offset + length]
