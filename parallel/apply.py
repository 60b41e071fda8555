"""From a configuration to a model that is laid over the mesh, initialized and ready to train."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from model.build import build_model
from model.config import BaseModelConfig
from parallel.activation_checkpoint import checkpoint_activations
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from parallel.errors import LayoutError
from parallel.fsdp import ShardedModel, master_dtype, shard
from parallel.initialize import initialize_shards, place_buffers


def lay_out(
    model_config: BaseModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    activation_checkpoint: ActivationCheckpointConfig,
    compilation: CompileConfig,
    mesh: DeviceMesh,
    seed: int,
) -> ShardedModel:
    """Build, lay out and initialize. The order matters:

    1. build on the meta device, so that no rank ever holds a whole model;
    2. activation checkpointing innermost, so that what is compiled contains the recomputation;
    3. compile block by block, inside of sharding, whose hooks can't be compiled;
    4. shard, then allocate and fill only the local shards.

    Raises LayoutError where what is asked for needs blocks, and the model has none.
    """
    with torch.device("meta"):
        model = build_model(model_config).to(master_dtype(precision))
    if not model.layers and (compilation.enabled or activation_checkpoint.mode != "none"):
        raise LayoutError(
            f"model.type={model_config.type} has no blocks, which are what compile and activation_checkpoint take: "
            f"leave both out"
        )
    checkpoint_activations(model, activation_checkpoint)
    if compilation.enabled:
        for layer in model.layers:
            layer.compile()
    sharded = shard(model, mesh, parallel, precision)
    model.to_empty(device="cpu" if parallel.cpu_offload else mesh.device_type)
    place_buffers(model, torch.device(mesh.device_type))
    initialize_shards(model, model_config, seed)
    return sharded
