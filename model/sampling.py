"""How the next token is chosen. B batch, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import require


@dataclass(frozen=True)
class Sampling:
    """Settings of `sample`, in the order in which they apply; each is off by default.

    Raises ValueError for a value that can't be.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that were seen are divided by this, negative ones multiplied (CTRL, Keskar et al. 2019)."""
    vocab_size: int | None = None
    """Only tokens below it are drawn, since the model's own vocabulary may be padded."""
    temperature: float = 1.0
    """Logits are divided by this; 0 takes the likeliest token, whatever is set below."""
    top_k: int | None = None
    """Only so many of the likeliest; ties at the edge all stay."""
    top_p: float | None = None
    """Only the fewest likeliest whose probabilities reach this (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Only those at least this times as probable as the likeliest (Nguyen et al. 2024)."""
    stop_tokens: tuple[int, ...] = ()
    """Any of them ends a row."""

    def __post_init__(self) -> None:
        size, k, p, least = self.vocab_size, self.top_k, self.top_p, self.min_p
        penalty, temperature = self.repetition_penalty, self.temperature
        require("repetition_penalty", penalty, penalty > 0, "above 0, 1 for none")
        require("vocab_size", size, size is None or size >= 1, "1 or more")
        require("temperature", temperature, temperature >= 0, "0 (the likeliest token) or more")
        require("top_k", k, k is None or k >= 1, "1 or more")
        require("top_p", p, p is None or 0 < p <= 1, "above 0 and at most 1")
        require("min_p", least, least is None or 0 <= least <= 1, "from 0 to 1")


def sample(
    logits: Tensor,
    sampling: Sampling,
    *,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits (B, V), seen (B, V) bool: which tokens the repetition penalty is for -> tokens (B, 1)."""
    adjusted = adjust(logits, sampling, seen)
    if sampling.temperature == 0:
        return adjusted.argmax(dim=-1, keepdim=True)
    return torch.multinomial(adjusted.softmax(dim=-1), 1, generator=generator)


def adjust(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V), seen (B, V) -> those to draw from, (B, at most V), -inf where a token is left out."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty))
    logits = logits[:, : sampling.vocab_size]
    return logits if sampling.temperature == 0 else _truncate(logits / sampling.temperature, sampling)


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        edge = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        likelier = probabilities.cumsum(dim=-1) - probabilities
        ordered = ordered.masked_fill(likelier >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    if sampling.min_p is not None:
        probabilities = logits.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
