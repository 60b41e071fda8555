"""Generation, token by token. B batch, T prompt, V vocabulary."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.reader import Reader
from model.sampling import Sampling, sample
from model.transformer import Trunk


def generate(
    model: Trunk,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """Prompt tokens (B, T) int64 -> (B, T + n), n <= max_new_tokens; see `stream`.

    settings: fields of Sampling, such as temperature=0.8, in place of those of `sampling`.
    """
    new = stream(
        model,
        tokens,
        max_new_tokens,
        replace(sampling or Sampling(), **settings),
        padding=padding,
        generator=generator,
        use_cache=use_cache,
        inputs=inputs,
    )
    return torch.cat([tokens, *new], dim=1)


def stream(
    model: Trunk,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield each new (B, 1) as it comes.

    padding (B, T) bool: True on the left of prompts that are shorter than others, see `model.reader.pad_left`.
    A row that made a stop token repeats it; the end is when all rows have. inputs: what the model takes beside
    the tokens. Dropout is off. Of a sharded model every rank must ask for the same.
    Raises ValueError, before anything is generated, if the model or an argument can't do it.
    """
    reader = Reader(model, tokens, max_new_tokens, padding=padding, inputs=inputs, use_cache=use_cache)

    def run() -> Iterator[Tensor]:
        seen: Tensor | None = None
        stops = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=tokens.device)
        new, stopped = tokens[:, -1:], torch.zeros_like(tokens[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits = reader.logits()
            if seen is None and sampling.repetition_penalty != 1:
                seen = _occurring(tokens, padding, logits)
            drawn = sample(logits, sampling, seen=seen, generator=generator)
            new = new.where(stopped, drawn)
            yield new
            stopped = stopped | torch.isin(new, stops)
            if sampling.stop_tokens and bool(stopped.all()):
                return
            reader.add(new)
            if seen is not None:
                seen.scatter_(1, new, True)

    return run()


def _occurring(tokens: Tensor, padding: Tensor | None, logits: Tensor) -> Tensor:
    """Which tokens of the vocabulary (B, V) are among tokens (B, T), padding (B, T) left out."""
    counted = torch.ones_like(tokens) if padding is None else (~padding).long()
    return torch.zeros_like(logits, dtype=torch.int64).scatter_add_(1, tokens, counted) > 0
