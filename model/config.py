"""The `model` section of the configuration. Imports pydantic only, so that reading a config is fast."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from model.attention_config import AttentionConfig
from model.moe_config import MoEConfig
from model.positional_config import PositionalConfig, check_positions
from model.section import SECTION, Rate, known, largest_divisor

__all__ = [
    "AttentionConfig",
    "BaseModelConfig",
    "FeedForwardConfig",
    "LossConfig",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "PositionalConfig",
    "known",
    "with_defaults",
]


def with_defaults(values: Any, defaults: Mapping[str, Mapping[str, Any]]) -> Any:
    """What a model type's own `defaults` of its sections make of the values that a user gives."""
    if not isinstance(values, Mapping):
        return values
    sections = {name: values.get(name, {}) for name in defaults}
    merged = {name: {**defaults[name], **s} for name, s in sections.items() if isinstance(s, Mapping)}
    return {**values, **merged}


class FeedForwardConfig(BaseModel):
    model_config = SECTION

    variant: Literal["swiglu", "geglu", "geglu_tanh", "glu", "mlp"] = "swiglu"
    """Gated by SiLU, GELU (or its tanh approximation) or a sigmoid; or mlp: linear, activation, linear."""
    d_ff: PositiveInt | None = None
    """Hidden width. Unset: int(expansion_factor * d_model), rounded up to multiple_of."""
    expansion_factor: PositiveFloat = 2.6667
    """Hidden width over d_model where d_ff is unset."""
    multiple_of: PositiveInt = 64
    """What a hidden width derived from expansion_factor is rounded up to."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"] = "silu"
    """mlp only. gelu_tanh is GPT-2's approximation."""
    bias: bool = False
    """Biases on all projections."""
    dropout: Rate = 0.0
    """Dropout of the hidden activations."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.variant != "mlp" and self.activation != "silu":
            raise ValueError(
                f"model.ffn.activation={self.activation} has no effect with model.ffn.variant={self.variant}:"
                f" leave it out, or use model.ffn.variant=mlp"
            )
        return self


class LossConfig(BaseModel):
    """What training adds to the cross-entropy. Evaluation reports the cross-entropy alone."""

    model_config = SECTION

    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's normalizer (PaLM: 0.0001)."""
    label_smoothing: Rate = 0.0
    """Share of the target that is spread evenly over the vocabulary."""


class NormConfig(BaseModel):
    model_config = SECTION

    type: Literal["rmsnorm", "layernorm", "scalenorm"] = "rmsnorm"
    """rmsnorm scales only; layernorm also centres, and has a bias; scalenorm scales by one number."""
    eps: PositiveFloat = 1e-5
    """Added to the mean square or the variance."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    """Norm before each sub-layer, after its residual sum, or before and after the sub-layer."""
    embedding: bool = False
    """Norm of the embeddings too, before the first block (BLOOM)."""


class MupConfig(BaseModel):
    """Maximal update parametrization for Adam (Yang et al. 2022, Tensor Programs V, table 8).

    The base is this model with every width divided by d_model / base_width: d_ff, and heads or head_dim, too.
    Learning rate and initial weights that are best for the base are so for this model. Over the base's, weights
    with wide inputs have a rate of 1 / multiplier (with weight decay times it, so that their product stays) and
    initial weights of 1 / root of it; those of a head or a router, whose outputs don't grow, 1 / multiplier.
    """

    model_config = SECTION

    base_width: PositiveInt
    """The d_model for which optimizer.lr and init_std were found."""
    base_head_dim: PositiveInt | None = None
    """The base's head_dim, where heads grow wider with the model and not only more: scores are then divided by
    head_dim / root(base_head_dim), not by root(head_dim)."""


class BaseModelConfig(BaseModel):
    """What the configuration of every model has."""

    model_config = SECTION

    type: str
    """Which model; see `model.models`."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. Unset: the data's vocabulary, rounded up to vocab_size_multiple."""
    vocab_size_multiple: PositiveInt = 128
    """What a vocabulary taken from the data is rounded up to."""
    d_model: PositiveInt = 512
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Blocks."""
    max_seq_len: PositiveInt = 2048
    """Longest sequence in training, tokens; learned positions can't go past it."""
    init: Literal["gpt2", "xavier"] = "gpt2"
    """gpt2: normal weights; xavier: uniform ones for linear layers, by their widths, normal embeddings."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of normal initial weights."""
    residual_scaled_init: bool = True
    """Divide the initial weights of projections into the residual stream by the root of their number (GPT-2)."""

    def residual_sums(self, name: str) -> int:
        """Projections into the residual stream that the parameter `name` belongs to."""
        return 2 * self.num_layers

    @property
    def width_multiplier(self) -> float:
        """By how much the model is wider than the one whose learning rate and initial weights it is given."""
        return 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments of `loss_sum` beside the targets: columns of the data, or `seeds`.

        seeds (B,) int64 are a function of (run seed, step, sequence), for a model that draws random numbers.
        """
        return ("tokens",)


class ModelConfig(BaseModelConfig):
    """A transformer. Values left unset are filled in here, so that what is shown and saved is complete."""

    type: str = "transformer"
    """Which model; see `model.models`."""
    attention: AttentionConfig = AttentionConfig()
    positional: PositionalConfig = PositionalConfig()
    ffn: FeedForwardConfig = FeedForwardConfig()
    moe: MoEConfig | None = None
    """Unset: every feed-forward layer is dense."""
    norm: NormConfig = NormConfig()
    loss: LossConfig = LossConfig()
    mup: MupConfig | None = None
    """Unset: the standard parametrization, whose best learning rate falls with the width."""
    tie_embeddings: bool = True
    """One matrix for the embedding and the head."""
    parallel_layers: bool = False
    """Attention and feed-forward side by side on the same normalized input (PaLM, GPT-J)."""
    dropout: Rate = 0.0
    """Dropout of the embeddings and of each sub-layer's output."""

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        heads = self.attention.num_heads
        if self.attention.head_dim is None:
            if self.d_model % heads:
                raise ValueError(
                    f"model.attention.num_heads={heads} does not divide model.d_model={self.d_model}: use "
                    f"{largest_divisor(self.d_model, heads)} heads, or set model.attention.head_dim"
                )
            update = {"head_dim": self.d_model // heads}
            object.__setattr__(self, "attention", self.attention.model_copy(update=update))
        if self.ffn.d_ff is None:
            wanted, multiple = int(self.ffn.expansion_factor * self.d_model), self.ffn.multiple_of
            update = {"d_ff": max(1, -(-wanted // multiple)) * multiple}
            object.__setattr__(self, "ffn", self.ffn.model_copy(update=update))
        self._resolve_moe()
        self._check_mup()
        object.__setattr__(self, "positional", self.positional.resolved(self.max_seq_len))
        check_positions(self.positional, self.attention, self.d_model)
        return self

    def _resolve_moe(self) -> None:
        if self.moe is None:
            return
        if self.moe.first_layer >= self.num_layers:
            raise ValueError(
                f"model.moe.first_layer={self.moe.first_layer} leaves no layer with experts, since "
                f"model.num_layers={self.num_layers}, counted from 0: use at most {self.num_layers - 1}"
            )
        if self.moe.d_ff is None:
            object.__setattr__(self, "moe", self.moe.model_copy(update={"d_ff": self.ffn.d_ff}))

    def _check_mup(self) -> None:
        if self.mup is None:
            return
        if self.init == "xavier":
            raise ValueError(
                "model.init=xavier has no scale that model.mup could carry over from a narrower model: use "
                "model.init=gpt2"
            )
        if self.mup.base_head_dim is not None and self.attention.variant == "linear":
            raise ValueError(
                f"model.mup.base_head_dim={self.mup.base_head_dim} has no effect with "
                f"model.attention.variant=linear, which has no scores: leave it out"
            )

    @property
    def width_multiplier(self) -> float:
        """By how much the model is wider than the one whose learning rate and initial weights it is given."""
        return 1.0 if self.mup is None else self.d_model / self.mup.base_width

    @property
    def readout_scale(self) -> float:
        """What a head's inputs are multiplied by: a tied one can't have initial weights and a rate of its own."""
        return 1.0 / self.width_multiplier if self.tie_embeddings else 1.0

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by: scores are sums over head_dim, which learned ones grow with."""
        if self.mup is None or self.mup.base_head_dim is None:
            return 1.0
        return float((self.mup.base_head_dim / known(self.attention.head_dim)) ** 0.5)

    @property
    def memory_len(self) -> int | None:
        """Tokens of the other sequence that blocks look at by cross-attention; None: there is none."""
        return None

    @property
    def moe_layers(self) -> range:
        """The layers with experts, counted from 0."""
        if self.moe is None:
            return range(0)
        return range(self.moe.first_layer, self.num_layers, self.moe.every_nth_layer)
