"""A rank's model, or its stage of a pipeline, with its share of the work, before there is memory for it."""

from dataclasses import dataclass

import torch
from torch import nn

from model.build import build_model
from model.config import BaseModelConfig
from model.model import Model
from model.positions import Positions
from model.transformer import Trunk
from parallel.collectives import share
from parallel.config import ParallelConfig
from parallel.context import Context, share_sequences
from parallel.cut import Cut
from parallel.expert import share_experts
from parallel.fp8 import use_fp8
from parallel.mesh import Mesh
from parallel.pipeline import Stage
from parallel.stages import split_layers, stages_of
from parallel.tensor import share_out


@dataclass(frozen=True)
class Built:
    """What a rank has of a model, before it is sharded."""

    model: Model
    root: nn.Module
    """The model, or the stage that holds it."""
    cuts: dict[str, Cut]


@dataclass(frozen=True)
class Blueprint:
    """All that says what a rank has of a model."""

    config: BaseModelConfig
    parallel: ParallelConfig
    mesh: Mesh
    context: Context | None
    fp8: bool = False
    """The blocks' linear layers compute in 8 bits."""

    @property
    def stages(self) -> list[int]:
        """The numbers of the stages that this rank has; 0 where there is no pipeline."""
        parallel = self.parallel
        return stages_of(self.mesh.pp_rank, parallel.pp, parallel.num_stages, parallel.pp_schedule)

    def build(self, stage: int, dtype: torch.dtype) -> Built:
        """Build on the meta device, so that no rank ever holds a whole model, and leave out what others have.

        Raises LayoutError where layers can't be computed as asked for.
        """
        with torch.device("meta"):
            model = build_model(self.config).to(dtype)
            root: nn.Module = model
            if self.parallel.num_stages > 1:
                root = self._stage(model, stage)
            cuts = self._share_work(model)
            if self.fp8:
                use_fp8(model.layers)
            return Built(model, root, cuts)

    def _stage(self, model: Model, index: int) -> Stage:
        assert isinstance(model, Trunk)
        stages = self.parallel.num_stages
        layers = split_layers(model.config, model.config.max_seq_len, stages)
        return Stage(model, index, layers[index], is_last=index == stages - 1, context=self.context)

    def _share_work(self, model: Model) -> dict[str, Cut]:
        """Cut sequences, weights and experts; nothing of it where the dimension has one rank."""
        mesh = self.mesh
        if self.context is not None:
            share_sequences(model, self.context)
        cuts = share_out(model, mesh.tp, sequence_parallel=self.parallel.sequence_parallel)
        if mesh.layout.ep > 1:
            share_experts(model, cuts, mesh.ep)
        for module in model.modules():
            if isinstance(module, Positions):
                _share_heads(module, mesh, all_tokens=self.parallel.cp_method == "heads")
        return cuts


def _share_heads(positions: Positions, mesh: Mesh, *, all_tokens: bool) -> None:
    """A bias on the scores is made for the heads that this rank has; all_tokens: and has all tokens of, under cp."""
    start, stop = share(len(positions.heads), mesh.tp)
    positions.heads, positions.first_row = range(start, stop), start
    positions.part_heads = positions.heads
    if all_tokens and mesh.layout.cp > 1:
        positions.part_heads = positions.heads[slice(*share(len(positions.heads), mesh.cp))]
