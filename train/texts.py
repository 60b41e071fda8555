"""Texts that a model writes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.prepare_pairs import source_ids
from data.tokenizer import Tokenizer
from model.beam import BeamSearch
from model.encoder_decoder.model import EncoderDecoder
from model.flow_matching.model import FlowMatching
from model.reader import pad_left
from model.transformer import Trunk
from train.decoding import Decoding, Prompts, Refinement, draw_tokens
from train.errors import RunError


@dataclass(frozen=True)
class TextSettings:
    """What is written after a prompt. Raises RunError for what can't be."""

    decoding: Decoding
    max_new_tokens: int = 128
    samples: int = 1
    """Texts for each prompt."""
    seed: int = 0
    stop_texts: tuple[str, ...] = ()
    """A text ends before any of them, as it does at the document's end."""

    def __post_init__(self) -> None:
        if "" in self.stop_texts:
            raise RunError("--stop '': give a text of one character or more")
        if isinstance(self.decoding, BeamSearch) and self.samples > self.decoding.beams:
            raise RunError(
                f"--num-samples {self.samples}: --beams {self.decoding.beams} finds no more than "
                f"{self.decoding.beams}: ask for fewer samples, or more beams"
            )


def continuations(
    model: Trunk, tokenizer: Tokenizer, prompts: Sequence[str], settings: TextSettings, device: torch.device
) -> Iterator[list[str]]:
    """Yield what goes on from the prompts in pieces as they come: one, maybe empty, of each text, the texts of a
    prompt side by side.

    Raises:
        RunError: at once, if the model can't do it.
    """
    decoding = replace(settings.decoding, vocab_size=tokenizer.vocab_size)
    if not isinstance(decoding, Refinement):
        decoding = replace(decoding, stop_tokens=(tokenizer.eos_id,))
    drawn = [
        draw_tokens(
            model,
            given.to(device),
            settings.max_new_tokens,
            decoding,
            samples=settings.samples,
            seed=settings.seed,
        )
        for given in _encode(model, tokenizer, prompts)
    ]
    texts = [WrittenText(tokenizer, settings.stop_texts) for _ in range(len(prompts) * settings.samples)]
    return _decoded((torch.cat(new) for new in zip(*drawn, strict=True)), texts)


def shown_prompt(model: Trunk, prompt: str) -> str:
    """What of the prompt belongs to the text that is made: nothing where the text is an answer to it."""
    return "" if isinstance(model, EncoderDecoder) else prompt


def _encode(model: Trunk, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[Prompts]:
    """All in one batch, or each in its own where the model takes no padding.

    An empty prompt is the end of a document, after which another begins. To an encoder the prompt is the source, cut
    to the longest that it was trained on; the decoder starts with padding.
    """
    if isinstance(model, EncoderDecoder):
        length = model.config.memory_len
        source, padding = pad_left([source_ids(tokenizer, prompt, length) for prompt in prompts])
        inputs = {"source": source} | ({} if padding is None else {"source_padding": padding})
        return [Prompts(torch.full((len(prompts), 1), tokenizer.pad_id), inputs=inputs)]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if isinstance(model, FlowMatching):
        return [Prompts(torch.tensor([ids], dtype=torch.int64)) for ids in encoded]
    return [Prompts(*pad_left([ids or [tokenizer.eos_id] for ids in encoded]))]


def _decoded(drawn: Iterator[Tensor], texts: list["WrittenText"]) -> Iterator[list[str]]:
    for new in drawn:
        yield [text.add(tokens) for text, tokens in zip(texts, new.tolist(), strict=True)]
        if all(text.ended for text in texts):
            break
    yield [text.finish() for text in texts]


class WrittenText:
    """One text as its tokens come, up to the document's end or a stop text, which is left out."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: tuple[str, ...]) -> None:
        self.ended = False
        self._decoder, self._end = tokenizer.incremental_decoder(), tokenizer.eos_id
        self._stop_texts = stop_texts
        self._held, self._cut = "", False

    def add(self, tokens: list[int]) -> str:
        """The text that is certain after these tokens."""
        pieces = []
        for token in tokens:
            if not self.ended:
                pieces.append(self._until_stop(self._decoder.add(token)))
            self.ended |= token == self._end
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back."""
        return "" if self._cut else self._until_stop(self._decoder.finish()) + self._held

    def _until_stop(self, piece: str) -> str:
        """All but what a stop text may begin with."""
        text, self._held = self._held + piece, ""
        found = [(at + len(stop), at) for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        if found:
            self.ended = self._cut = True
            return text[: min(found)[1]]  # of the one that was complete first
        begun = [size for stop in self._stop_texts for size in range(len(stop)) if text.endswith(stop[:size])]
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]
