"""What a model makes of its own: text, or pictures. All ranks ask together, and get the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.codebook import Codebook, grid
from data.dataset import DatasetInfo, ImageCodesInfo, TextInfo
from data.tokenizer import Tokenizer
from model.flow_matching.model import FlowMatching
from model.sampling import Sampling
from model.transformer import Trunk
from train.config import EvaluationConfig
from train.decoding import TEMPERATURE, Decoding, Prompts, Refinement, draw_tokens
from train.errors import RunError
from train.texts import TextSettings, continuations, shown_prompt

CLASSES_SHOWN, PICTURES_OF_EACH = 10, 8


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
    decoding: Decoding
    if isinstance(data, ImageCodesInfo):
        decoding = Sampling()
        if isinstance(model, FlowMatching):
            decoding = Refinement(settings.sample_steps, temperature=1.0)
        classes = None
        if takes_classes(model):
            classes = settings.sample_classes or range(min(len(data.class_names), CLASSES_SHOWN))
        return Pictures(make_pictures(model, data, classes, PICTURES_OF_EACH, decoding, seed, device))
    assert isinstance(data, TextInfo)
    decoding = Sampling(temperature=TEMPERATURE, top_k=50)
    if isinstance(model, FlowMatching):
        decoding = Refinement(settings.sample_steps)
    text = TextSettings(decoding, settings.sample_tokens, seed=seed)
    prompt, tokenizer = settings.sample_prompt, Tokenizer.load(data.tokenizer_path)
    pieces = continuations(model, tokenizer, [prompt], text, device)
    return shown_prompt(model, prompt) + "".join(piece for (piece,) in pieces)


def make_pictures(
    model: Trunk,
    data: ImageCodesInfo,
    classes: Sequence[int] | None,
    each: int,
    decoding: Decoding,
    seed: int,
    device: torch.device,
) -> np.ndarray:
    """A grid (H, W, C) uint8 with a row of `each` pictures for each class; without classes, as many rows as columns.

    Raises:
        RunError: classes that the model doesn't know, or takes none of.
    """
    codes = draw_codes(model, data, classes, each, decoding, seed, device)
    return grid(Codebook.load(data.codebook_path).decode(codes), each)


def draw_codes(
    model: Trunk,
    data: ImageCodesInfo,
    classes: Sequence[int] | None,
    each: int,
    decoding: Decoding,
    seed: int,
    device: torch.device,
) -> np.ndarray:
    """Codes (N, rows, columns) of `each` pictures of every class; without classes, of `each` times `each`."""
    inputs: dict[str, Tensor] = {}
    if takes_classes(model):
        wanted = range(len(data.class_names)) if classes is None else classes
        if unknown := [at for at in wanted if not 0 <= at < len(data.class_names)]:
            raise RunError(f"there is no class {unknown[0]}: there are 0 to {len(data.class_names) - 1}")
        inputs["classes"] = torch.tensor(wanted)
        count = len(wanted)
    elif classes is not None:
        raise RunError("this model takes no classes (model.class_conditional): leave them out")
    else:
        count = each
    first = 0 if isinstance(model, FlowMatching) else 1
    start = Prompts(torch.full((count, first), data.start_id), inputs=inputs).to(device)
    decoding = replace(decoding, vocab_size=data.start_id)
    codes = torch.cat([*draw_tokens(model, start, data.seq_len, decoding, samples=each, seed=seed)], dim=1)
    return codes.reshape(-1, data.height, data.width).cpu().numpy()


def takes_classes(model: Trunk) -> bool:
    """Whether the model is told a class."""
    return "classes" in model.config.inputs
