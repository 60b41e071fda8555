"""The `data` section of a run's configuration."""

from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SourceConfig(BaseModel):
    """One of the data sets of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """What it is called in metrics and checkpoints."""
    path: str
    """A folder that `trireme prepare` made."""
    proportion: float = Field(gt=0, allow_inf_nan=False)
    """Its part of the sequences that are trained on, relative to the other sources' proportions."""


class DataConfig(BaseModel):
    """Which prepared data sets are read, and in what batches."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str | None = None
    """A folder that `trireme prepare` made."""
    sources: tuple[SourceConfig, ...] = ()
    """In place of `path`: the data sets of a mixture, each with its name, path and proportion."""
    micro_batch_size: int = 8
    """Sequences that one process puts through the model at once."""
    global_batch_size: int = 32
    """Sequences of an optimizer step, over all processes and micro-batches."""
    num_workers: int = 1
    """Processes that read ahead for each training process; 0 reads in the training process itself."""
    shuffle: bool = True
    """Read the sequences of each epoch in a random order (of the run's seed) instead of as they are stored."""
    verify: Literal["contents", "size"] = "contents"
    """What of every shard is compared with the index when a run starts: its SHA-256, for which each node reads all data
    once, or its size alone."""
    on_bad_shard: Literal["fail", "skip"] = "fail"
    """Where a training shard is missing, cut short or damaged: refuse to start, or leave it out, with other
    sequences of its source in place of its own. Their number is told in the metrics."""

    @model_validator(mode="after")
    def _check_sources(self) -> "DataConfig":
        if self.path is None and not self.sources:
            raise ValueError(
                "'data.path' is missing: set it to a folder that `trireme prepare` made, or data.sources to several"
            )
        if self.path is not None and self.sources:
            raise ValueError(
                f"data.path={self.path} and data.sources are both given: leave one out (data.path=null), "
                f"and make what data.path names one of the sources"
            )
        for key in ("name", "path"):
            for value, count in Counter(getattr(source, key) for source in self.sources).items():
                if count > 1:
                    raise ValueError(
                        f"data.sources: {count} have {key}={value}: give each a {key} of its own"
                    )
        return self

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for name in ("micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: give a positive number of sequences")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: give 0 or more")
        if self.global_batch_size % self.micro_batch_size:
            nearest = max(1, round(self.global_batch_size / self.micro_batch_size)) * self.micro_batch_size
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} is not a multiple of "
                f"data.micro_batch_size={self.micro_batch_size}, so micro-batches can't fill it: "
                f"set data.global_batch_size={nearest}, or another micro-batch size"
            )
        return self
