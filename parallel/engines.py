"""The engine that a configuration names."""

import torch

from parallel.engine import Engine, EngineConfig, MakeOptimizer
from parallel.layout import Layout
from parallel.mesh import mesh_of
from parallel.torch_engine import TorchEngine


def make_engine(
    config: EngineConfig, layout: Layout, device: torch.device, make_optimizer: MakeOptimizer
) -> Engine:
    """Made by all ranks together, with initial weights.

    Raises LayoutError where what is asked for can't be laid out so.
    """
    mesh = mesh_of(layout, device.type)
    if config.parallel.engine == "deepspeed":
        # only here: it needn't be installed, and takes a second
        from parallel.zero.library import load

        load(device)
        from parallel.zero.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh, device, make_optimizer)
    return TorchEngine(config, mesh, device, make_optimizer)
