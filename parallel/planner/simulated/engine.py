"""The engine of one rank of a job, on fake tensors: what needs values, or other ranks' word, is supposed."""

from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from parallel.apply import LaidOut, build_shards
from parallel.build import Blueprint
from parallel.context import Context
from parallel.engine import EngineConfig, MakeOptimizer
from parallel.initialize import place_buffers
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline, SharedParameters
from parallel.stages import stages_of
from parallel.torch_engine import TorchEngine


class SimulatedPipeline(Pipeline):
    """Its stages don't ask each other whether all know what they will be sent: they do."""

    def _make(self, count: int, *activation: int) -> Any:
        schedule = super()._make(count, *activation)
        schedule._warmup_p2p = _know_shapes
        return schedule


def _know_shapes(stages: list[Any], *_: Any) -> None:
    # only here: older versions of torch have no such question, and no answer
    from torch.distributed.pipelining._utils import InferenceMode

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


class SimulatedEngine(TorchEngine):
    """Made and used in a mode of fake tensors, in a process that stands at a simulated rank.

    Its optimizer has its state, as after a first step.
    """

    pipeline = SimulatedPipeline

    def __init__(
        self, config: EngineConfig, mesh: Mesh, device: torch.device, make_optimizer: MakeOptimizer
    ) -> None:
        self._config = config
        super().__init__(config, mesh, device, make_optimizer)
        self._allocate_optimizer_state()

    def _lay_out(self, config: EngineConfig, context: Context | None) -> LaidOut:
        # modules and meshes are built of real tensors, those on the meta device
        with unset_fake_temporarily():
            laid_out = build_shards(config, self.mesh, context)
        self.models = laid_out.models
        for model in laid_out.models:
            model.to_empty(device=self.device)
            place_buffers(model, self.device)
        return laid_out

    def _share_parameters(self) -> SharedParameters:
        with unset_fake_temporarily():
            return _SharedParameters(self.parameters, self.mesh.pp, self._config, self.mesh)


class _SharedParameters(SharedParameters):
    """By building the other ranks' stages, rather than by asking them."""

    def __init__(
        self, names: dict[str, torch.nn.Parameter], group: dist.ProcessGroup, config: EngineConfig, mesh: Mesh
    ) -> None:
        self._blueprint = Blueprint(config.model, config.parallel, mesh, None)
        super().__init__(names, group)

    def _everyones(self, names: list[str], group: dist.ProcessGroup) -> list[list[str]]:
        parallel = self._blueprint.parallel
        everyones = []
        for rank in range(group.size()):
            stages = stages_of(rank, parallel.pp, parallel.num_stages, parallel.pp_schedule)
            models = (self._blueprint.build(stage, torch.float32).model for stage in stages)
            everyones.append([name for model in models for name, _ in model.named_parameters()])
        return everyones

    def _make_groups(self, wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        return {ranks: dist.new_group(list(ranks)) for ranks in sorted(wanted)}
