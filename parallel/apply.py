"""From a configuration to a model that is laid over the mesh, initialized and ready to train."""

from dataclasses import dataclass

import torch
from torch import nn

from model.build import build_model
from model.config import BaseModelConfig
from model.model import Model
from model.positions import Positions
from model.transformer import Trunk
from parallel.activation_checkpoint import checkpoint_activations
from parallel.collectives import share
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from parallel.context import Context, share_sequences
from parallel.cut import Cut, Cuts
from parallel.errors import LayoutError
from parallel.expert import share_experts
from parallel.fsdp import ShardedModel, master_dtype, shard
from parallel.initialize import initialize_shards, place_buffers
from parallel.mesh import Mesh
from parallel.pipeline import Stage
from parallel.stages import split_layers, stages_of
from parallel.tensor import share_out


@dataclass(frozen=True)
class LaidOut:
    """What a rank has of a model."""

    roots: list[ShardedModel]
    """The model, or the pipeline stages that this rank has of it."""
    models: list[Model]
    """The model itself, without the stage around it, of each root."""
    cuts: Cuts


def lay_out(
    model_config: BaseModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    activation_checkpoint: ActivationCheckpointConfig,
    compilation: CompileConfig,
    mesh: Mesh,
    context: Context | None,
    seed: int,
) -> LaidOut:
    """Build and shard a model, then allocate and fill only the local shards.

    Raises LayoutError where what is asked for needs blocks, and the model has none.
    """
    laid_out = build_shards(
        model_config, parallel, precision, activation_checkpoint, compilation, mesh, context
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
) -> LaidOut:
    """Build and shard a model, all on the meta device. The order matters:

    1. build on the meta device, so that no rank ever holds a whole model;
    2. leave out what other stages have;
    3. cut what a rank has of every weight, so that all that follows sees a smaller model;
    4. activation checkpointing innermost, so that what is compiled contains the recomputation;
    5. compile block by block, inside of sharding, whose hooks can't be compiled;
    6. shard.
    """
    models: list[Model] = []
    roots: list[ShardedModel] = []
    cuts: dict[str, Cut] = {}
    for number in stages_of(mesh.pp_rank, parallel.pp, parallel.num_stages, parallel.pp_schedule):
        with torch.device("meta"):
            model = build_model(model_config).to(master_dtype(precision))
            if not model.layers and (compilation.enabled or activation_checkpoint.mode != "none"):
                raise LayoutError(
                    f"model.type={model_config.type} has no blocks, which are what compile and "
                    f"activation_checkpoint take: leave both out"
                )
            root: nn.Module = model
            if parallel.num_stages > 1:
                root = _stage(model, parallel, number, context)
            cuts |= _share_work(model, parallel, mesh, context)
        checkpoint_activations(model, activation_checkpoint)
        if compilation.enabled:
            for layer in model.layers:
                layer.compile()
        models.append(model)
        roots.append(shard(model.layers, root, mesh, parallel, precision))
    return LaidOut(roots, models, cuts)


def _stage(model: Model, parallel: ParallelConfig, index: int, context: Context | None) -> Stage:
    assert isinstance(model, Trunk)
    layers = split_layers(model.config, model.config.max_seq_len, parallel.num_stages)
    return Stage(model, index, layers[index], is_last=index == parallel.num_stages - 1, context=context)


def _share_work(
    model: Model, parallel: ParallelConfig, mesh: Mesh, context: Context | None
) -> dict[str, Cut]:
    """Cut sequences, weights and experts; nothing of it where the dimension has one rank."""
    if context is not None:
        share_sequences(model, context)
    cuts = share_out(model, mesh.tp, sequence_parallel=parallel.sequence_parallel)
    if mesh.layout.ep > 1:
        share_experts(model, cuts, mesh.ep)
    for module in model.modules():
        if isinstance(module, Positions):
            _share_heads(module, mesh)
    return cuts


def _share_heads(positions: Positions, mesh: Mesh) -> None:
    """A bias on the scores is made for the heads that this rank has."""
    start, stop = share(len(positions.heads), mesh.tp)
    positions.heads, positions.first_row = range(start, stop), start
    start, stop = share(len(positions.heads), mesh.cp) if mesh.layout.cp > 1 else (0, stop - start)
    positions.part_heads = positions.heads[start:stop]
