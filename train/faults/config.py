"""The `faults` section of a run's configuration."""

from pydantic import BaseModel, ConfigDict, Field


class FaultsConfig(BaseModel):
    """What a run does about what goes wrong on its way; each fault is a line of `faults.jsonl` in its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_skipped_steps: int = Field(20, ge=1)
    """A step whose loss or gradient is not finite changes no weight; after so many in a row the run ends. fp16's loss
    scale may need 16 to find its place."""
