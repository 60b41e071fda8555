"""The `parallel`, `activation_checkpoint` and `compile` sections of a run's configuration."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from parallel.sizes import parse_bytes
from parallel.stages import MANY_STAGES, Schedule
from parallel.zero.config import DeepSpeedConfig

Precision = Literal["fp32", "bf16", "fp16", "fp64", "fp8"]
ContextMethod = Literal["heads", "ring"]
RecomputeMode = Literal["none", "selective", "full", "every_nth", "auto"]


class ParallelConfig(BaseModel):
    """How many ranks each dimension of the mesh has; see `parallel.layout.Layout`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    engine: Literal["torch", "deepspeed"] = "torch"
    """What shards and steps the model: torch's FSDP2, or DeepSpeed's ZeRO."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Of the engine deepspeed alone."""
    dp_replicate: int = Field(1, ge=1)
    """Groups of data-parallel ranks that each hold a whole copy of the weights."""
    dp_shard: int = -1
    """Data-parallel ranks over which weights, gradients and optimizer state are sharded; -1: what is left."""
    pp: int = Field(1, ge=1)
    """Ranks among which the layers are shared out."""
    pp_schedule: Schedule = "1f1b"
    """In which order a rank of a pipeline works on micro-batches, forward and backward."""
    stages_per_rank: int | None = Field(None, ge=1)
    """interleaved schedules: stages of consecutive layers that a rank has. Unset: 2, and 1 for gpipe and 1f1b."""
    cp: int = Field(1, ge=1)
    """Ranks among which the tokens of every sequence are shared out."""
    cp_method: ContextMethod = "heads"
    """How tokens of different ranks meet in attention. heads: each rank gets all tokens of some of the heads. ring:
    keys and values go from rank to rank, so that ranks may be more than heads."""
    tp: int = Field(1, ge=1)
    """Ranks among which every layer's heads and features, and the vocabulary, are shared out."""
    sequence_parallel: bool = True
    """With tp: between attention and feed-forward the ranks work on different tokens, and not all on all."""
    async_tp: bool = False
    """With sequence_parallel and compile.enabled, on GPUs that reach each other's memory: gathers and scatters of
    tokens in pieces, during the products beside them."""
    ep: int = Field(1, ge=1)
    """Ranks among which experts are shared out. They are some of dp_shard x cp, so ep divides these."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward and gather them again in the backward."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.dp_shard != -1 and self.dp_shard < 1:
            raise ValueError(
                f"parallel.dp_shard={self.dp_shard}: give a positive number, or -1 for what is left"
            )
        if self.async_tp and self.tp == 1:
            raise ValueError(
                "parallel.async_tp=true, but parallel.tp=1 has no collectives beside products: use parallel.tp=2 or "
                "more, or parallel.async_tp=false"
            )
        if self.async_tp and not self.sequence_parallel:
            raise ValueError(
                "parallel.async_tp=true, but parallel.sequence_parallel=false sums whole activations, which aren't cut "
                "in pieces: use parallel.sequence_parallel=true, or parallel.async_tp=false"
            )
        if self.stages_per_rank is None:
            object.__setattr__(self, "stages_per_rank", 2 if self.pp_schedule in MANY_STAGES else 1)
        if self.stages_per_rank != 1 and self.pp_schedule not in MANY_STAGES:
            raise ValueError(
                f"parallel.stages_per_rank={self.stages_per_rank}, but parallel.pp_schedule={self.pp_schedule} has 1: "
                f"leave it unset, or use parallel.pp_schedule=interleaved_1f1b"
            )
        if self.stages_per_rank != 2 and self.pp_schedule == "zbv_zero_bubble":
            raise ValueError(
                f"parallel.stages_per_rank={self.stages_per_rank}, but parallel.pp_schedule=zbv_zero_bubble has 2: "
                f"leave it unset"
            )
        return self

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, 1 where there is none."""
        return 1 if self.pp == 1 else self.pp * (self.stages_per_rank or 1)


class ActivationCheckpointConfig(BaseModel):
    """Which blocks recompute their activations in the backward instead of keeping them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: RecomputeMode = "none"
    """`none`: keep all; `selective`: keep what matrix products, attention and collectives made, and recompute the
    rest; `full`: recompute every block; `every_nth`: recompute one block in `n`; `auto`: as little as
    `memory_budget` allows, block by block."""
    n: int = Field(2, ge=1)
    """With `every_nth`: one block in this many, by its number in the whole model, is recomputed."""
    memory_budget: Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)] | None = None
    """With `auto`: what a rank's blocks may keep of one micro-batch for the backward, such as `20GB`. In a pipeline
    a rank keeps it for each micro-batch that is under way: up to parallel.pp of them, and with gpipe all of a step."""

    @model_validator(mode="after")
    def _check(self) -> "ActivationCheckpointConfig":
        if (self.mode == "auto") == (self.memory_budget is not None):
            return self
        if self.mode == "auto":
            raise ValueError(
                "activation_checkpoint.mode=auto must know how much a rank may keep: set "
                "activation_checkpoint.memory_budget, 20GB for example"
            )
        raise ValueError(
            f"activation_checkpoint.memory_budget={self.memory_budget} has no effect with "
            f"activation_checkpoint.mode={self.mode}: leave it out, or use activation_checkpoint.mode=auto"
        )


class CompileConfig(BaseModel):
    """torch.compile."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    enabled: bool = False
    """Compile every block. The first step takes longer; a failure to compile is an error."""
