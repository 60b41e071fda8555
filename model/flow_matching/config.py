"""The `model` section of a flow matching model. Imports pydantic only."""

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from model.config import ModelConfig, with_defaults


class FlowMatchingConfig(ModelConfig):
    """A transformer that sees all tokens and the time; without positions unless asked for."""

    type: Literal["flow_matching"] = "flow_matching"
    """Which model; see `model.models`."""
    path: Literal["linear", "mixture"] = "linear"
    """Between noise and data at time t: both, weighted 1 - t and t; or at each place one of them, the data with
    probability t. A linear path shows each place its own answer, so that little is learned of the others."""
    time_embed_dim: PositiveInt = 256
    """Sines and cosines of the time that go into its embedding; even."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        return with_defaults(
            values, {"attention": {"mask_type": "bidirectional"}, "positional": {"encoding": "none"}}
        )

    @model_validator(mode="after")
    def _check_time(self) -> "FlowMatchingConfig":
        if self.time_embed_dim % 2:
            raise ValueError(
                f"model.time_embed_dim={self.time_embed_dim} is odd, but sines and cosines come in pairs: use "
                f"{self.time_embed_dim + 1}"
            )
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Noise and time are drawn; the data are the targets."""
        return ("seeds",)
