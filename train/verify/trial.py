"""A run of the small model: in one process and plain torch, and in a worker process at any layout."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from model.build import build_model
from model.config import BaseModelConfig
from model.initialize import initialize
from model.loss import IGNORE_INDEX
from model.model import Model
from model.moe import take_expert_counts, update_balance
from parallel.activation_budget import total
from parallel.activation_memory import measure
from parallel.build import Blueprint
from parallel.config import ActivationCheckpointConfig, CompileConfig, Precision
from parallel.context import context_of
from parallel.engine import Engine, EngineConfig
from parallel.engines import make_engine
from parallel.errors import LayoutError
from parallel.fsdp import COMPUTE_DTYPE, master_dtype
from parallel.gradients import gathered
from parallel.mesh import mesh_of
from train import checkpoint
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig, OptimizerConfig
from train.optimizer import make_optimizer
from train.verify.arrangements import Arrangement
from train.verify.batches import Batches

INITIAL, FINAL = "initial.safetensors", "final.safetensors"


@dataclass(frozen=True)
class Experiment:
    """What is computed once in one process and then at every layout."""

    model: BaseModelConfig
    optimizer: OptimizerConfig
    precision: Precision
    seed: int
    steps: int
    global_batch_size: int
    folder: Path
    """Where the reference's weights are, and checkpoints go."""

    @property
    def batches(self) -> Batches:
        """Of every step."""
        return Batches(self.model, self.global_batch_size, self.seed)


@dataclass(frozen=True)
class Curve:
    """What a run reports, by step."""

    losses: list[float]
    grad_norms: list[float]
    """Before clipping."""


@dataclass(frozen=True)
class Trial:
    """What one rank saw of a run at a layout, beside the reference. Differences are relative ones, the largest."""

    names: frozenset[str]
    """Of the weights that the rank has."""
    initial_equal: bool
    """Whether those were the reference's to the last bit."""
    loss: float
    grad_norm: float
    weights: float
    """After the last step."""
    resumed: float
    """Of loss, norm and weights of a run that went on from this one's checkpoint at another layout."""
    data_rank: int
    ids: list[list[int]]
    """Of the sequences that the rank was given, by step."""


class _LossSum(nn.Module):
    """A model whose forward is its loss."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model.loss_sum(**inputs)


def run_reference(experiment: Experiment) -> Curve:
    """One process, plain torch: whole batches, no sharding, no micro-batches. Its weights go to the folder.

    In low precision the weights are cast for each forward, and their gradients come back in that of the weights.
    """
    settings, dtype = experiment.optimizer, COMPUTE_DTYPE[experiment.precision]
    model = build_model(experiment.model).to(master_dtype(experiment.precision))
    initialize(model, experiment.model, experiment.seed)
    loss_sum, optimizer = _LossSum(model), make_optimizer(model, experiment.model, settings)
    save_file(loss_sum.state_dict(), experiment.folder / INITIAL)
    curve = Curve([], [])
    for step in range(experiment.steps):
        batch = experiment.batches.share(step, rank=0, ranks=1)
        cast = {name: parameter.to(dtype) for name, parameter in loss_sum.named_parameters()}
        total = functional_call(loss_sum, cast, kwargs=batch.inputs | {"targets": batch.targets})
        loss = total / (batch.targets != IGNORE_INDEX).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        counts = take_expert_counts(model)
        if counts is not None:
            update_balance(model, counts)
        curve.losses.append(loss.item())
        curve.grad_norms.append(norm.item())
    save_file(loss_sum.state_dict(), experiment.folder / FINAL)
    return curve


def try_arrangement(experiment: Experiment, arrangement: Arrangement, expected: Curve) -> Trial | str:
    """Run at a layout, in every process of the group; halfway save, and go on from there at another layout too.

    Returns why it is refused where the engine only finds that.
    """
    _hush()
    try:
        engine = engine_of(experiment, arrangement, experiment.seed)
    except LayoutError as error:
        return str(error)
    initial = load_file(experiment.folder / INITIAL)
    weights = {name: gathered(tensor) for name, tensor in engine.weights().items()}
    initial_equal = all(
        name in initial and torch.equal(tensor, initial[name]) for name, tensor in weights.items()
    )
    halfway = (experiment.steps + 1) // 2
    curve, ids = Curve([], []), []
    ids += _train(engine, experiment, range(halfway), curve)
    path = checkpoint.save(
        experiment.folder / "checkpoints",
        engine.state(),
        Progress(halfway, 0, {}),
        CheckpointConfig(keep=1),
        {},
    )
    ids += _train(engine, experiment, range(halfway, experiment.steps), curve)
    return Trial(
        frozenset(weights),
        initial_equal,
        _largest(curve.losses, expected.losses),
        _largest(curve.grad_norms, expected.grad_norms),
        _weights_apart(engine, experiment),
        _go_on_elsewhere(experiment, _elsewhere(arrangement), path, halfway, expected),
        engine.mesh.data_rank,
        ids,
    )


def _hush() -> None:
    """What torch says of speed is of no use here."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)


def engine_of(experiment: Experiment, arrangement: Arrangement, seed: int) -> Engine:
    """Called by all ranks. Raises LayoutError where the model can't be laid out so."""
    if arrangement.compile:
        torch.compiler.reset()  # code compiled for other layouts counts towards the limit of kinds
    config = EngineConfig(
        experiment.model,
        arrangement,
        experiment.precision,
        _recomputation(experiment, arrangement),
        CompileConfig(enabled=arrangement.compile),
        micro_batch_size=arrangement.micro_batch(experiment.global_batch_size),
        global_batch_size=experiment.global_batch_size,
        seq_len=experiment.model.max_seq_len,
        max_grad_norm=experiment.optimizer.max_grad_norm,
        seed=seed,
    )
    make = partial(make_optimizer, config=experiment.optimizer)
    return make_engine(config, arrangement.layout, torch.device("cpu"), make)


def _recomputation(experiment: Experiment, arrangement: Arrangement) -> ActivationCheckpointConfig:
    """With `auto` the budget is a half of what the rank with the most would keep without one."""
    mode = arrangement.activation_checkpoint
    if mode != "auto":
        return ActivationCheckpointConfig(mode=mode)
    mesh = mesh_of(arrangement.layout, "cpu")
    context = context_of(arrangement, mesh)
    micro_batch = arrangement.micro_batch(experiment.global_batch_size), experiment.model.max_seq_len
    blueprint = Blueprint(experiment.model, arrangement, mesh, context)
    kept = measure(blueprint, COMPUTE_DTYPE[experiment.precision], micro_batch)
    most = torch.tensor(total(kept, dict.fromkeys(kept, "none")))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return ActivationCheckpointConfig(mode=mode, memory_budget=max(1, int(most) // 2))


def _train(engine: Engine, experiment: Experiment, steps: Iterable[int], curve: Curve) -> list[list[int]]:
    """Add to the curve; returns the ids of the sequences of each step."""
    ids = []
    for step in steps:
        batch = experiment.batches.share(step, engine.mesh.data_rank, engine.layout.data_size)
        ids.append(batch.sample_ids.tolist())
        curve.losses.append(engine.forward_backward(batch, step).item())
        curve.grad_norms.append(engine.step(experiment.optimizer.lr).item())
    return ids


def _elsewhere(arrangement: Arrangement) -> Arrangement:
    """Replicas, or shards where those are what there was."""
    ranks = arrangement.layout.world_size
    replicas = arrangement.dp_replicate == ranks
    return Arrangement(dp_shard=ranks) if replicas else Arrangement(dp_replicate=ranks)


def _go_on_elsewhere(
    experiment: Experiment, arrangement: Arrangement, path: Path, step: int, expected: Curve
) -> float:
    """The largest difference of a run that goes on from a checkpoint of a step, over what another seed made."""
    engine = engine_of(experiment, arrangement, experiment.seed + 1)
    engine.restore(lambda tensors: checkpoint.load_tensors(path, tensors))
    curve = Curve([], [])
    _train(engine, experiment, range(step, experiment.steps), curve)
    return max(
        _largest(curve.losses, expected.losses[step:]),
        _largest(curve.grad_norms, expected.grad_norms[step:]),
        _weights_apart(engine, experiment),
    )


def _weights_apart(engine: Engine, experiment: Experiment) -> float:
    """The largest difference, by a tensor's largest element, or an optimizer's step where none is as large."""
    expected = load_file(experiment.folder / FINAL)
    apart = []
    for name, tensor in engine.weights().items():
        scale = max(expected[name].abs().max().item(), experiment.optimizer.lr)
        apart.append((gathered(tensor) - expected[name]).abs().max().item() / scale)
    return _finite(max(apart))


def _finite(difference: float) -> float:
    """What is no number is as far apart as can be, and `max` passes over it."""
    return difference if isfinite(difference) else inf


def _largest(found: Sequence[float], expected: Sequence[float]) -> float:
    return max((_finite(abs(f - e) / abs(e)) for f, e in zip(found, expected, strict=True)), default=0.0)
