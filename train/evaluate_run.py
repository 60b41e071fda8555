"""Evaluating and sampling from a finished run's folder, in one process."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import DatasetInfo, TextInfo, open_dataset
from data.tokenizer import Tokenizer
from model.build import build_model
from model.generate import stream
from model.transformer import Trunk
from parallel.config import ParallelConfig
from parallel.fsdp import COMPUTE_DTYPE
from parallel.processes import pick_device, process_group
from train import checkpoint, checkpoint_folder
from train.config import Config, EvaluationConfig
from train.config_file import Loaded
from train.errors import RunError
from train.evaluate import validation_loss
from train.resolve import resolve
from train.run import make_engine
from train.run_folder import RunFolder, open_run
from train.samples import Choice, encode_prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The loss of a checkpoint."""

    step: int
    loss: float
    """Mean over the validation split's targets, in nats."""

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return math.exp(self.loss)


def evaluate_run(path: str, sequences: int | None) -> Evaluation:
    """The validation loss of a run's newest checkpoint, computed by one process.

    Raises:
        RunError, InputError: no such run, no checkpoint, or its data are gone.
    """
    folder, config = open_run(path)
    config = config.model_copy(
        update={"parallel": ParallelConfig(), "evaluation": EvaluationConfig(sequences=sequences)}
    )
    plan = resolve(Loaded(config, {}), world_size=1)
    newest = _newest(folder)
    device = pick_device()
    with process_group(device):
        engine = make_engine(plan, device)
        checkpoint.load_tensors(newest, engine.weights())
        loss = validation_loss(engine, config)
    return Evaluation(checkpoint_folder.load_progress(newest).step, loss)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in the run's compute dtype, with what makes sense of its tokens."""

    model: Trunk
    data: DatasetInfo
    config: Config
    device: torch.device


def load_run(path: str) -> LoadedRun:
    """The newest checkpoint of a run, on one device.

    Raises:
        RunError: no such run, or no checkpoint in it.
    """
    folder, config = open_run(path)
    device = pick_device()
    with torch.device("meta"):
        model = build_model(config.model)
    if config.precision == "fp64":
        model.double()
    assert isinstance(model, Trunk)
    model.to_empty(device=device)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    checkpoint.load_tensors(_newest(folder), tensors)
    model.to(COMPUTE_DTYPE[config.precision]).eval()
    return LoadedRun(model, open_dataset(folder.path), config, device)


def continuation(run: LoadedRun, prompt: str, max_new_tokens: int, choice: Choice) -> Iterator[str]:
    """The text that goes on from `prompt`, piece by piece, up to the document's end."""
    assert isinstance(run.data, TextInfo)
    tokenizer = Tokenizer.load(run.data.tokenizer_path)
    decoder = tokenizer.incremental_decoder()
    try:
        tokens = stream(
            run.model,
            encode_prompt(tokenizer, prompt).to(run.device),
            max_new_tokens,
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            stop_token=tokenizer.eos_id,
            vocab_size=run.data.vocab_size,
            generator=torch.Generator(run.device).manual_seed(choice.seed),
        )
    except ValueError as error:  # what this model can't generate
        raise RunError(str(error)) from None
    for token in tokens:
        yield decoder.add(int(token))
    yield decoder.finish()


def _newest(folder: RunFolder) -> Path:
    newest = checkpoint_folder.latest(folder.checkpoints, log)
    if newest is None:
        raise RunError(f"{folder.path} has no checkpoint: train it until its first")
    return newest
