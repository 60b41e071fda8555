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
    return TorchEngine(config, mesh_of(layout, device.type), device, make_optimizer)
