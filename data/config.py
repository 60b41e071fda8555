"""The `data` section of a run's configuration."""

from pydantic import BaseModel, ConfigDict, model_validator


class DataConfig(BaseModel):
    """Which prepared data set is read, and in what batches."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str
    """A folder that `trireme prepare` made."""
    micro_batch_size: int = 8
    """Sequences that one process puts through the model at once."""
    global_batch_size: int = 32
    """Sequences of an optimizer step, over all processes and micro-batches."""
    num_workers: int = 1
    """Processes that read ahead for each training process; 0 reads in the training process itself."""
    shuffle: bool = True
    """Read the sequences of each epoch in a random order (of the run's seed) instead of as they are stored."""

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
