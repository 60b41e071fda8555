"""From a configuration to a model that is laid over the mesh, initialized and ready to train."""

import torch

from model.build import build_model
from model.config import BaseModelConfig
from model.model import Model
from model.positions import Positions
from parallel.activation_checkpoint import checkpoint_activations
from parallel.collectives import share
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from parallel.context import Context, share_sequences
from parallel.cut import Cuts
from parallel.expert import share_experts
from parallel.fsdp import ShardedModel, master_dtype, shard
from parallel.initialize import initialize_shards, place_buffers
from parallel.mesh import Mesh
from parallel.tensor import share_out


def lay_out(
    model_config: BaseModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    activation_checkpoint: ActivationCheckpointConfig,
    compilation: CompileConfig,
    mesh: Mesh,
    context: Context | None,
    seed: int,
) -> tuple[ShardedModel, Cuts]:
    """Build, lay out and initialize. The order matters:

    1. build on the meta device, so that no rank ever holds a whole model;
    2. cut what a rank has of every weight, so that all that follows sees a smaller model;
    3. activation checkpointing innermost, so that what is compiled contains the recomputation;
    4. compile block by block, inside of sharding, whose hooks can't be compiled;
    5. shard, then allocate and fill only the local shards.
    """
    with torch.device("meta"):
        model = build_model(model_config).to(master_dtype(precision))
        cuts = _share_work(model, parallel, mesh, context)
    checkpoint_activations(model, activation_checkpoint)
    if compilation.enabled:
        for layer in model.layers:
            layer.compile()
    sharded = shard(model, mesh, parallel, precision)
    model.to_empty(device="cpu" if parallel.cpu_offload else mesh.device_type)
    place_buffers(model, torch.device(mesh.device_type))
    initialize_shards(model, model_config, cuts, mesh, seed)
    return sharded, cuts


def _share_work(model: Model, parallel: ParallelConfig, mesh: Mesh, context: Context | None) -> Cuts:
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
