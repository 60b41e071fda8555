"""Evaluating and loading a finished run's folder, in one process."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import ImageCodesInfo, open_dataset
from data.tokenizer import Tokenizer
from model.build import build_model
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
from train.run import engine_of
from train.run_folder import RunFolder, open_run

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
        engine = engine_of(plan, device)
        engine.restore(lambda tensors: checkpoint.load_tensors(newest, tensors), weights_only=True)
        loss = validation_loss(engine, config)
    return Evaluation(checkpoint_folder.load_progress(newest).step, loss)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in the run's compute dtype, with what makes sense of its tokens."""

    model: Trunk
    vocabulary: Tokenizer | ImageCodesInfo
    config: Config
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a run on text. Raises RunError for another."""
        if not isinstance(self.vocabulary, Tokenizer):
            raise RunError(
                f"{self.vocabulary.path} makes pictures, which have no tokenizer: give a run on text"
            )
        return self.vocabulary


def load_run(path: str) -> LoadedRun:
    """The newest checkpoint of a run, on one device.

    Raises:
        RunError: no such run, no checkpoint in it, or its model doesn't generate.
    """
    folder, config = open_run(path)
    device = pick_device()
    with torch.device("meta"):
        model = build_model(config.model)
    if config.precision == "fp64":
        model.double()
    if not isinstance(model, Trunk):
        raise RunError(
            f"{path}: a model of type {config.model.type} can be trained and evaluated, but not generate"
        )
    model.to_empty(device=device)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.load_tensors(_newest(folder), tensors)
    for parameter in model.parameters():  # buffers stay in fp32, as in training
        parameter.data = parameter.data.to(COMPUTE_DTYPE[config.precision])
    return LoadedRun(model.eval(), _vocabulary(folder), config, device)


def _vocabulary(folder: RunFolder) -> Tokenizer | ImageCodesInfo:
    info = open_dataset(folder.path) if folder.dataset.is_file() else None  # an imported run has none
    return info if isinstance(info, ImageCodesInfo) else Tokenizer.load(folder.tokenizer)


def _newest(folder: RunFolder) -> Path:
    newest = checkpoint_folder.latest(folder.checkpoints, log)
    if newest is None:
        raise RunError(f"{folder.path} has no checkpoint: train it until its first")
    return newest
