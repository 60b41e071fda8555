"""From a configuration to a model that is laid over the mesh, initialized and ready to train."""

from dataclasses import dataclass

import torch

from model.build import build_model
from model.config import BaseModelConfig
from model.model import Model
from parallel.activation_budget import Budgeted, budgeted
from parallel.activation_checkpoint import checkpoint_activations, recompute_by_name
from parallel.activation_memory import measure
from parallel.build import Blueprint
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from parallel.context import Context
from parallel.cut import Cut
from parallel.errors import LayoutError
from parallel.fsdp import COMPUTE_DTYPE, ShardedModel, master_dtype, shard
from parallel.initialize import initialize_shards, place_buffers
from parallel.mesh import Mesh


@dataclass(frozen=True)
class LaidOut:
    """What a rank has of a model."""

    roots: list[ShardedModel]
    """The model, or the pipeline stages that this rank has of it."""
    models: list[Model]
    """The model itself, without the stage around it, of each root."""
    cuts: dict[str, Cut]
    budgeted: Budgeted | None
    """How blocks recompute where a budget decides that."""


def lay_out(
    model_config: BaseModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    activation_checkpoint: ActivationCheckpointConfig,
    compilation: CompileConfig,
    mesh: Mesh,
    context: Context | None,
    seed: int,
    micro_batch: tuple[int, int],
) -> LaidOut:
    """Build and shard a model, then allocate and fill only the local shards; micro-batches are (B, T), whole sequences.

    Raises LayoutError where what is asked for needs blocks, and the model has none, and where activations can't be
    kept within their budget.
    """
    laid_out = build_shards(
        model_config, parallel, precision, activation_checkpoint, compilation, mesh, context, micro_batch
    )
    for model in laid_out.models:
        model.to_empty(device="cpu" if parallel.cpu_offload else mesh.device_type)
        place_buffers(model, torch.device(mesh.device_type))
        initialize_shards(model, model_config, laid_out.cuts, mesh, seed)
    return laid_out


def build_shards(
    model_config: BaseModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    activation_checkpoint: ActivationCheckpointConfig,
    compilation: CompileConfig,
    mesh: Mesh,
    context: Context | None,
    micro_batch: tuple[int, int],
) -> LaidOut:
    """Build and shard a model, all on the meta device. The order matters:

    1. build on the meta device, so that no rank ever holds a whole model;
    2. leave out what other stages have;
    3. cut what a rank has of every weight, so that all that follows sees a smaller model;
    4. activation checkpointing innermost, so that what is compiled contains the recomputation;
    5. compile block by block, inside of sharding, whose hooks can't be compiled;
    6. shard.
    """
    check_blocks(model_config, activation_checkpoint, compilation)
    blueprint = Blueprint(model_config, parallel, mesh, context, fp8=precision == "fp8")
    by_budget = by_memory(blueprint, activation_checkpoint, precision, micro_batch)
    laid_out = LaidOut([], [], {}, by_budget)
    for stage in blueprint.stages:
        built = blueprint.build(stage, master_dtype(precision))
        prepare_layers(built.model, activation_checkpoint, by_budget, compilation)
        laid_out.roots.append(shard(built.model.layers, built.root, mesh, parallel, precision))
        laid_out.models.append(built.model)
        laid_out.cuts.update(built.cuts)
    return laid_out


def by_memory(
    blueprint: Blueprint,
    activation_checkpoint: ActivationCheckpointConfig,
    precision: Precision,
    micro_batch: tuple[int, int],
) -> Budgeted | None:
    """How blocks recompute where a budget for (B, T) decides that, else None.

    Raises LayoutError where activations can't be kept within it.
    """
    if activation_checkpoint.memory_budget is None:
        return None
    kept = measure(blueprint, COMPUTE_DTYPE[precision], micro_batch)
    return budgeted(kept, activation_checkpoint.memory_budget)


def prepare_layers(
    model: Model,
    activation_checkpoint: ActivationCheckpointConfig,
    by_budget: Budgeted | None,
    compilation: CompileConfig,
) -> None:
    """Let layers recompute, then compile them, in place."""
    recompute = recompute_by_name(activation_checkpoint) if by_budget is None else by_budget.recompute
    checkpoint_activations(model, recompute)
    if compilation.enabled:
        # a block that comes in too many kinds would otherwise go on uncompiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for layer in model.layers:
            layer.compile()


def check_blocks(
    config: BaseModelConfig, activation_checkpoint: ActivationCheckpointConfig, compilation: CompileConfig
) -> None:
    """Raises LayoutError where what is asked for needs blocks, and the model has none."""
    if not compilation.enabled and activation_checkpoint.mode == "none":
        return
    with torch.device("meta"):
        has_blocks = bool(build_model(config).layers)
    if not has_blocks:
        raise LayoutError(
            f"model.type={config.type} has no blocks, which are what compile and activation_checkpoint take: "
            f"leave both out"
        )
