"""How tokens are drawn: by a sampler, by beam search, or by refining noise. B batch, P prompt, T new tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from model.beam import BeamSearch, beam_search
from model.flow_matching.model import FlowMatching
from model.flow_matching.refine import refine
from model.generate import stream
from model.sampling import Sampling
from model.transformer import Trunk
from train.errors import RunError

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Refinement:
    """Of a flow matching model; see `model.flow_matching.refine`."""

    steps: int = 32
    temperature: float = TEMPERATURE
    vocab_size: int | None = None
    """Only tokens below it are made."""


Decoding = Sampling | BeamSearch | Refinement


@dataclass(frozen=True)
class Prompts:
    """What is gone on from."""

    tokens: Tensor
    """(B, P) int64"""
    padding: Tensor | None = None
    """(B, P) bool, True on the left of the shorter ones; `model.reader.pad_left` makes both."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What the model takes beside tokens, B rows of each."""

    def to(self, device: torch.device) -> "Prompts":
        """On a device."""
        padding = None if self.padding is None else self.padding.to(device)
        return Prompts(
            self.tokens.to(device), padding, {name: value.to(device) for name, value in self.inputs.items()}
        )

    def repeat(self, times: int) -> "Prompts":
        """Each row so many times."""
        tokens, inputs = self.tokens.repeat_interleave(times, 0), self.inputs.items()
        padding = None if self.padding is None else self.padding.repeat_interleave(times, 0)
        return Prompts(tokens, padding, {name: value.repeat_interleave(times, 0) for name, value in inputs})


def choose_decoding(model: Trunk, options: Mapping[str, Any]) -> Decoding:
    """What the command line's options, None where not given, come to for this model.

    Raises:
        RunError: an option has no effect, or a value can't be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    kind: type[Decoding]
    if isinstance(model, FlowMatching):
        kind, reason = Refinement, "a flow matching model refines all tokens together"
    elif "beams" in given:
        kind, reason = BeamSearch, "--beams searches for what is likeliest"
    else:
        kind, reason = Sampling, "without --beams this model generates token by token"
    names = {setting.name for setting in fields(kind)}
    refuse({name: value for name, value in given.items() if name not in names}, reason)
    defaults: dict[str, Any] = {"temperature": TEMPERATURE} if "temperature" in names else {}
    try:
        return kind(**defaults | given)
    except ValueError as error:
        raise RunError(str(error)) from None


def refuse(options: Mapping[str, object], reason: str) -> None:
    """Raise RunError if any of these options is given: neither None, nor False, nor empty."""
    given = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False, "", [])
    ]
    if given:
        raise RunError(f"{' and '.join(given)}: {reason}: leave {'it' if len(given) == 1 else 'them'} out")


def draw_tokens(
    model: Trunk, prompts: Prompts, count: int, decoding: Decoding, *, samples: int = 1, seed: int = 0
) -> Iterator[Tensor]:
    """Yield new tokens (B * samples, T) as they come, up to `count`: one by one when sampling, else all at once.

    Of beam search the `samples` best. Raises RunError at once if the model can't do it.
    """
    generator = torch.Generator(prompts.tokens.device).manual_seed(seed)
    start = prompts.tokens.shape[1]
    try:
        if isinstance(decoding, BeamSearch):
            found = beam_search(
                model, prompts.tokens, count, decoding, padding=prompts.padding, inputs=prompts.inputs
            )
            return iter([found.tokens[:, :samples, start:].flatten(0, 1)])
        rows = prompts.repeat(samples)
        if isinstance(decoding, Sampling):
            return stream(
                model,
                rows.tokens,
                count,
                decoding,
                padding=rows.padding,
                generator=generator,
                inputs=rows.inputs,
            )
        return iter([_refined(model, rows.tokens, count, decoding, generator)])
    except ValueError as error:  # what this model can't generate
        raise RunError(str(error)) from None


def _refined(
    model: Trunk, prompt: Tensor, count: int, refinement: Refinement, generator: torch.Generator
) -> Tensor:
    assert isinstance(model, FlowMatching)
    shape, highest = (
        (len(prompt), prompt.shape[1] + count),
        refinement.vocab_size or model.embedding.num_embeddings,
    )
    noise = torch.randint(highest, shape, generator=generator, device=prompt.device)
    made = refine(
        model,
        noise,
        refinement.steps,
        temperature=refinement.temperature,
        prompt=prompt,
        vocab_size=refinement.vocab_size,
    )
    return made[:, prompt.shape[1] :]
