"""The `model.moe` section of the configuration."""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from model.section import SECTION


class MoEConfig(BaseModel):
    """A mixture of experts in place of feed-forward layers; an expert is of the kind that model.ffn says."""

    model_config = SECTION

    num_experts: Annotated[int, Field(ge=2)] = 8
    """Experts of a layer."""
    top_k: PositiveInt = 2
    """Experts that a token is routed to."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How scores are made of the router's logits: over all experts, or for each expert by itself."""
    normalize_top_k: bool | None = None
    """Divide the scores of a token's experts by their sum. Unset: true, but false with top_k 1."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token goes through beside those that it is routed to."""
    d_ff: PositiveInt | None = None
    """Hidden width of one expert. Unset: model.ffn.d_ff."""
    first_layer: NonNegativeInt = 0
    """The first layer with experts, counted from 0."""
    every_nth_layer: PositiveInt = 1
    """From first_layer on, one layer in so many has experts."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes the first capacity_factor * length * top_k / num_experts tokens of a
    sequence, rounded up, and drops the others. Unset: none is dropped."""
    balance: Literal["loss", "bias"] = "loss"
    """What evens the experts' load: a loss, or a bias on their scores that is updated at every step."""
    load_balance_loss: NonNegativeFloat | None = None
    """Weight of the load balancing loss of a sequence. Unset: 0.01, and 0.0001 with balance bias."""
    bias_rate: NonNegativeFloat | None = None
    """balance bias only: change of an expert's bias at a step. Unset: 0.001."""
    router_z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the router's normalizer; 0.001 is usual."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k={self.top_k} exceeds model.moe.num_experts={self.num_experts}: "
                f"use model.moe.top_k={min(2, self.num_experts)}"
            )
        if self.normalize_top_k is None:
            object.__setattr__(self, "normalize_top_k", self.top_k > 1)
        if self.normalize_top_k and self.top_k == 1:
            raise ValueError(
                "model.moe.normalize_top_k=true with model.moe.top_k=1 makes every weight 1, from which the "
                "router learns nothing: leave it unset, or use model.moe.top_k=2"
            )
        biased = self.balance == "bias"
        if self.bias_rate is not None and not biased:
            raise ValueError(
                f"model.moe.bias_rate={self.bias_rate:g} has no effect with model.moe.balance={self.balance}: "
                f"leave it out, or use model.moe.balance=bias"
            )
        if biased and self.bias_rate is None:
            object.__setattr__(self, "bias_rate", 0.001)
        if self.load_balance_loss is None:
            object.__setattr__(self, "load_balance_loss", 0.0001 if biased else 0.01)
        return self
