"""What a model makes of its own: text, or pictures. All ranks ask together, and get the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.codebook import Codebook, grid
from data.dataset import DatasetInfo, ImageCodesInfo, TextInfo
from data.prepare_pairs import source_ids
from data.tokenizer import Tokenizer
from model.encoder_decoder.model import EncoderDecoder
from model.flow_matching.model import FlowMatching
from model.flow_matching.refine import refine
from model.generate import generate
from model.transformer import Trunk
from train.config import EvaluationConfig
from train.errors import RunError

REFINEMENTS = 32
CLASSES_SHOWN, PICTURES_OF_EACH = 10, 8


@dataclass(frozen=True)
class Choice:
    """How tokens are drawn."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    steps: int = REFINEMENTS
    """Of a model that refines."""


@dataclass(frozen=True)
class Pictures:
    """A grid of pictures as one."""

    pixels: np.ndarray
    """(H, W, C) uint8"""


Sample = str | Pictures


def make_sample(
    model: torch.nn.Module, data: DatasetInfo, settings: EvaluationConfig, seed: int, device: torch.device
) -> Sample:
    """The sample of a training run, in the form of what it is trained on."""
    assert isinstance(model, Trunk)
    if isinstance(data, ImageCodesInfo):
        classes = range(min(len(data.class_names), CLASSES_SHOWN)) if takes_classes(model) else None
        return Pictures(make_pictures(model, data, classes, PICTURES_OF_EACH, Choice(1.0, seed=seed), device))
    assert isinstance(data, TextInfo)
    choice = Choice(0.8, top_k=50, seed=seed)
    tokenizer = Tokenizer.load(data.tokenizer_path)
    return make_text(model, tokenizer, settings.sample_prompt, settings.sample_tokens, choice, device)


def make_text(
    model: Trunk, tokenizer: Tokenizer, prompt: str, tokens: int, choice: Choice, device: torch.device
) -> str:
    """The prompt and up to `tokens` tokens more; of an encoder and decoder, what it answers to the prompt."""
    start, inputs = begin(model, tokenizer, prompt, device)
    full = draw_tokens(
        model, start, tokens, choice, tokenizer.vocab_size, stop_token=tokenizer.eos_id, inputs=inputs
    )
    return shown_prompt(model, prompt) + tokenizer.decode(full[0, start.shape[1] :].tolist())


def begin(
    model: Trunk, tokenizer: Tokenizer, prompt: str, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens (1, T) int64 to go on from, and what the model takes beside them.

    An empty prompt is the end of a document, after which another begins. To an encoder the prompt is the source, cut
    to the longest that it was trained on; the decoder starts with padding.
    """
    inputs: dict[str, Tensor] = {}
    if isinstance(model, EncoderDecoder):
        source = source_ids(tokenizer, prompt, model.config.memory_len)
        inputs["source"] = torch.tensor([source], device=device)
        start = [tokenizer.pad_id]
    elif isinstance(model, FlowMatching):
        start = tokenizer.encode(prompt)
    else:
        start = tokenizer.encode(prompt) or [tokenizer.eos_id]
    return torch.tensor([start], dtype=torch.int64, device=device), inputs


def shown_prompt(model: Trunk, prompt: str) -> str:
    """What of the prompt belongs to the text that is made."""
    return "" if isinstance(model, EncoderDecoder) else prompt


def make_pictures(
    model: Trunk,
    data: ImageCodesInfo,
    classes: Sequence[int] | None,
    each: int,
    choice: Choice,
    device: torch.device,
) -> np.ndarray:
    """A grid (H, W, C) uint8 with a row of `each` pictures for each class; without classes, as many rows as columns.

    Raises:
        RunError: classes that the model doesn't know, or takes none of.
    """
    codes = draw_codes(model, data, classes, each, choice, device)
    return grid(Codebook.load(data.codebook_path).decode(codes), each)


def draw_codes(
    model: Trunk,
    data: ImageCodesInfo,
    classes: Sequence[int] | None,
    each: int,
    choice: Choice,
    device: torch.device,
) -> np.ndarray:
    """Codes (N, rows, columns) of `each` pictures of every class; without classes, of `each` times `each`."""
    inputs: dict[str, Tensor] = {}
    if takes_classes(model):
        wanted = range(len(data.class_names)) if classes is None else classes
        if unknown := [at for at in wanted if not 0 <= at < len(data.class_names)]:
            raise RunError(f"there is no class {unknown[0]}: there are 0 to {len(data.class_names) - 1}")
        inputs["classes"] = torch.tensor(wanted, device=device).repeat_interleave(each)
        count = len(wanted) * each
    elif classes is not None:
        raise RunError("this model takes no classes (model.class_conditional): leave them out")
    else:
        count = each * each
    first = 0 if isinstance(model, FlowMatching) else 1
    start = torch.full((count, first), data.start_id, device=device)
    codes = draw_tokens(model, start, data.seq_len, choice, data.start_id, inputs=inputs)[:, first:]
    return codes.reshape(count, data.height, data.width).cpu().numpy()


def takes_classes(model: Trunk) -> bool:
    """Whether the model is told a class."""
    return "classes" in model.config.inputs


def draw_tokens(
    model: Trunk,
    start: Tensor,
    count: int,
    choice: Choice,
    vocab_size: int,
    *,
    stop_token: int | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> Tensor:
    """start (B, T) -> (B, T + n), n being `count`, or less where stop_token comes.

    Raises:
        RunError: the model can't do it.
    """
    generator = torch.Generator(start.device).manual_seed(choice.seed)
    try:
        if isinstance(model, FlowMatching):
            shape = (len(start), start.shape[1] + count)
            noise = torch.randint(vocab_size, shape, generator=generator, device=start.device)
            return refine(
                model,
                noise,
                choice.steps,
                temperature=choice.temperature,
                prompt=start,
                vocab_size=vocab_size,
            )
        return generate(
            model,
            start,
            count,
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            stop_tokens=() if stop_token is None else (stop_token,),
            vocab_size=vocab_size,
            generator=generator,
            inputs=inputs,
        )
    except ValueError as error:  # what this model can't generate
        raise RunError(str(error)) from None
