"""The `parallel`, `activation_checkpoint` and `compile` sections of a run's configuration."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16", "fp16", "fp64"]


class ParallelConfig(BaseModel):
    """How many ranks each dimension of the mesh has; see `parallel.layout.Layout`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    engine: Literal["torch"] = "torch"
    """What shards and steps the model: torch's FSDP2."""
    dp_replicate: int = Field(1, ge=1)
    """Groups of data-parallel ranks that each hold a whole copy of the weights."""
    dp_shard: int = -1
    """Data-parallel ranks over which weights, gradients and optimizer state are sharded; -1: what is left."""
    pp: int = Field(1, ge=1)
    """Ranks among which the layers are shared out."""
    cp: int = Field(1, ge=1)
    """Ranks among which the tokens of every sequence are shared out."""
    tp: int = Field(1, ge=1)
    """Ranks among which every layer's heads and features, and the vocabulary, are shared out."""
    sequence_parallel: bool = True
    """With tp: between attention and feed-forward the ranks work on different tokens, and not all on all."""
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
        return self


class ActivationCheckpointConfig(BaseModel):
    """Which blocks recompute their activations in the backward instead of keeping them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: Literal["none", "full", "every_nth"] = "none"
    """`none`: keep all; `full`: recompute every block; `every_nth`: recompute one block in `n`."""
    n: int = Field(2, ge=1)
    """With `every_nth`: one block in this many is recomputed."""


class CompileConfig(BaseModel):
    """torch.compile."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    enabled: bool = False
    """Compile every block. The first step takes longer; a failure to compile is an error."""
