"""The `faults` section of a run's configuration."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from train.duration import Seconds


class FaultsConfig(BaseModel):
    """What a run does about what goes wrong on its way; each fault is a line of `faults.jsonl` in its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_skipped_steps: int = Field(20, ge=1)
    """A step whose loss or gradient is not finite changes no weight; after so many in a row the run ends. fp16's loss
    scale may need 16 to find its place."""
    on_spike: Literal["log", "rollback"] = "log"
    """Where loss or gradient norm jump up: say so, or go back to the newest checkpoint and leave out the batches since
    then."""
    spike_threshold: float = Field(10.0, gt=0)
    """A spike is so many standard deviations above the median of the steps before; the deviation is estimated by
    the median absolute one, which single steps don't move."""
    spike_window: int = Field(100, ge=3)
    """The steps before; as long as there are fewer, nothing is a spike."""
    max_rollbacks: int = Field(3, ge=0)
    """After so many in a run, spikes are only told of."""
    hang_timeout: Seconds | None = 3600
    """A process in which no step ends for so long, such as `30m`, writes down where each of its threads stands and ends
    with 1, so that the launcher starts the ranks again or ends the job. What is done between two steps (evaluation,
    saving), and compiling before the first, counts as well."""
    compare_every_steps: int | None = Field(None, ge=1)
    """Every so many steps, and before each checkpoint, compare the weights of ranks that hold the same ones (over
    `parallel.dp_replicate` and `parallel.tp`). Where a rank differs, its device corrupts data: the run names it and
    ends."""
    find_slow_every_steps: int | None = Field(100, ge=1)
    """Every so many steps, compare what each rank does alone (waiting for its batches, a piece of work on its device
    and on its processor), and name those that hold the others up, with their machines."""
