"""Beam search: the likeliest continuations, as far as some of the best at each length lead to them.

B batch, T prompt, N beams, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import require
from model.reader import Reader
from model.transformer import Trunk


@dataclass(frozen=True)
class BeamSearch:
    """Settings of `beam_search`. Raises ValueError for a value that can't be."""

    beams: int = 4
    """Continuations that are kept at each length, and found at the end."""
    length_penalty: float = 1.0
    """A continuation's score is its log-probability / length ** length_penalty, as in transformers, the stop token
    counted: 0 is the log-probability, 1 its mean, and more favours longer ones."""
    vocab_size: int | None = None
    """Only tokens below it are made, since the model's own vocabulary may be padded."""
    stop_tokens: tuple[int, ...] = ()
    """Any of them ends a continuation."""

    def __post_init__(self) -> None:
        require("beams", self.beams, self.beams >= 1, "1 or more")
        require("vocab_size", self.vocab_size, self.vocab_size is None or self.vocab_size >= 1, "1 or more")


class Hypotheses(NamedTuple):
    """Sequences of which the best comes first."""

    tokens: Tensor
    """(B, N, T + n) int64, the prompt first; after a stop token it goes on with that."""
    scores: Tensor
    """(B, N); -inf where there are fewer than N."""

    def take(self, at: Tensor) -> "Hypotheses":
        """Those at the places (B, M) of each row."""
        return Hypotheses(self.tokens.take_along_dim(at.unsqueeze(-1), 1), self.scores.gather(1, at))


def beam_search(
    model: Trunk,
    tokens: Tensor,
    max_new_tokens: int,
    search: BeamSearch,
    *,
    padding: Tensor | None = None,
    use_cache: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
) -> Hypotheses:
    """Prompt tokens (B, T) int64 -> the best continuations up to max_new_tokens long that were found.

    At every length the N likeliest unfinished continuations go on, and of the N likeliest of all the finished
    ones are set aside (Wu et al. 2016), until none that goes on can come to a better score than the N best of
    those. padding, inputs: as in `model.generate.stream`. Dropout is off.
    Raises ValueError if the model or an argument can't do it.
    """
    require("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more")
    reader = Reader(model, tokens, max_new_tokens, padding=padding, inputs=inputs, use_cache=use_cache)
    stops = torch.tensor(search.stop_tokens, dtype=torch.int64, device=tokens.device)
    going = Hypotheses(tokens.unsqueeze(1), torch.zeros(len(tokens), 1, device=tokens.device))
    finished = Hypotheses(going.tokens[:, :0], going.scores[:, :0])
    for length in range(1, max_new_tokens + 1):
        candidates, rows = _extend(going, reader.logits(), search)
        ended = torch.isin(candidates.tokens[..., -1], stops) | (length == max_new_tokens)
        finished = _set_aside(finished, candidates, ended, length, search)
        unfinished = candidates.scores.masked_fill(ended, -torch.inf)
        chosen = unfinished.topk(min(search.beams, unfinished.shape[1])).indices
        going = Hypotheses(candidates.tokens, unfinished).take(chosen)
        longest = max_new_tokens if search.length_penalty > 0 else length + 1
        if bool((going.scores[:, 0] / longest**search.length_penalty <= finished.scores[:, -1]).all()):
            break
        reader.reorder(rows.gather(1, chosen).flatten())
        reader.add(going.tokens[..., -1].reshape(-1, 1))
    return finished


def _extend(going: Hypotheses, logits: Tensor, search: BeamSearch) -> tuple[Hypotheses, Tensor]:
    """Logits (B * N, V) of N that go on -> the C likeliest of all that are one token longer, from the best, and
    the row of the logits that each comes from, (B, C); as many as leave N unfinished.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    likelihoods = logits[:, : search.vocab_size].to(wide).log_softmax(dim=-1)
    batch, count = going.scores.shape
    scores = going.scores.unsqueeze(-1) + likelihoods.unflatten(0, (batch, count))
    kept = min(search.beams * (1 + len(search.stop_tokens)), scores[0].numel())
    best, index = scores.flatten(1).topk(kept)
    parents, tokens = index // scores.shape[-1], index % scores.shape[-1]
    longer = torch.cat((going.tokens.take_along_dim(parents.unsqueeze(-1), 1), tokens.unsqueeze(-1)), dim=-1)
    return Hypotheses(longer, best), parents + count * torch.arange(batch, device=index.device).unsqueeze(1)


def _set_aside(
    finished: Hypotheses, candidates: Hypotheses, ended: Tensor, length: int, search: BeamSearch
) -> Hypotheses:
    """The N best of what was finished and of the candidates that ended (B, C), if these are among the N likeliest."""
    rank = torch.arange(ended.shape[1], device=ended.device)
    scores = candidates.scores / length**search.length_penalty
    scores = scores.masked_fill(~ended | (rank >= search.beams), -torch.inf)
    as_long = torch.cat((finished.tokens, finished.tokens[..., -1:]), dim=-1)
    both = Hypotheses(
        torch.cat((as_long, candidates.tokens), dim=1), torch.cat((finished.scores, scores), dim=1)
    )
    return both.take(both.scores.topk(min(search.beams, both.scores.shape[1])).indices)
