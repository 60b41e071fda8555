"""From a configuration to a model that is laid over the mesh, initialized and ready to train."""

from dataclasses import dataclass

import torch

from model.build import build_model
from model.model import Model
from parallel.activation_budget import Budgeted, budgeted
from parallel.activation_checkpoint import checkpoint_activations, recompute_by_name
from parallel.activation_memory import measure
from parallel.async_tp import use_async_tp
from parallel.build import Blueprint
from parallel.context import Context
from parallel.cut import Cut
from parallel.engine import EngineConfig
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


def lay_out(config: EngineConfig, mesh: Mesh, context: Context | None) -> LaidOut:
    """Build and shard a model, then allocate and fill only the local shards.

    Raises LayoutError where what is asked for needs blocks, and the model has none, and where activations can't be
    kept within their budget.
    """
    laid_out = build_shards(config, mesh, context)
    for model in laid_out.models:
        model.to_empty(device="cpu" if config.parallel.cpu_offload else mesh.device_type)
        place_buffers(model, torch.device(mesh.device_type))
        initialize_shards(model, config.model, laid_out.cuts, mesh, config.seed)
    return laid_out


def build_shards(config: EngineConfig, mesh: Mesh, context: Context | None) -> LaidOut:
    """Build and shard a model, all on the meta device. The order matters:

    1. build on the meta device, so that no rank ever holds a whole model;
    2. leave out what other stages have;
    3. cut what a rank has of every weight, so that all that follows sees a smaller model;
    4. activation checkpointing innermost, so that what is compiled contains the recomputation;
    5. compile block by block, inside of sharding, whose hooks can't be compiled;
    6. shard.
    """
    check_blocks(config)
    parallel, precision = config.parallel, config.precision
    blueprint = Blueprint(config.model, parallel, mesh, context, fp8=precision == "fp8")
    by_budget = by_memory(blueprint, config)
    laid_out = LaidOut([], [], {}, by_budget)
    for stage in blueprint.stages:
        built = blueprint.build(stage, master_dtype(precision))
        prepare_layers(built.model, config, by_budget, mesh)
        laid_out.roots.append(shard(built.model.layers, built.root, mesh, parallel, precision))
        laid_out.models.append(built.model)
        laid_out.cuts.update(built.cuts)
    return laid_out


def by_memory(blueprint: Blueprint, config: EngineConfig) -> Budgeted | None:
    """How blocks recompute where a budget for a micro-batch decides that, else None.

    Raises LayoutError where activations can't be kept within it.
    """
    budget = config.activation_checkpoint.memory_budget
    if budget is None:
        return None
    shape = config.micro_batch_size, config.seq_len
    return budgeted(measure(blueprint, COMPUTE_DTYPE[config.precision], shape), budget)


def prepare_layers(model: Model, config: EngineConfig, by_budget: Budgeted | None, mesh: Mesh) -> None:
    """Let layers recompute, then compile them, in place.

    Raises LayoutError where collectives can't be made during products, and are asked for so.
    """
    by_name = recompute_by_name(config.activation_checkpoint) if by_budget is None else by_budget.recompute
    checkpoint_activations(model, by_name)
    if config.compile.enabled:
        # a block that comes in too many kinds would otherwise go on uncompiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if config.parallel.async_tp:
            use_async_tp(mesh)
        for layer in model.layers:
            layer.compile()


def check_blocks(config: EngineConfig) -> None:
    """Raises LayoutError where what is asked for needs blocks, and the model has none."""
    if not config.compile.enabled and config.activation_checkpoint.mode == "none":
        return
    with torch.device("meta"):
        has_blocks = bool(build_model(config.model).layers)
    if not has_blocks:
        raise LayoutError(
            f"model.type={config.model.type} has no blocks, which are what compile and activation_checkpoint take: "
            f"leave both out"
        )
