"""The `model` section of the configuration. Imports pydantic only, so that reading a config is fast."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


def with_defaults(values: Any, defaults: Mapping[str, Mapping[str, Any]]) -> Any:
    """What a model type's own `defaults` of its sections make of the values that a user gives."""
    if not isinstance(values, Mapping):
        return values
    sections = {name: values.get(name, {}) for name in defaults}
    merged = {name: {**defaults[name], **s} for name, s in sections.items() if isinstance(s, Mapping)}
    return {**values, **merged}


def known(value: int | None) -> int:
    """A value that its section has filled in."""
    assert value is not None
    return value


def _default_kv_heads(variant: str, num_heads: int) -> int:
    if variant == "mha":
        return num_heads
    return 1 if variant == "mqa" else _largest_divisor(num_heads, num_heads // 4)


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(number, limit), 1, -1) if number % d == 0), 1)


class AttentionConfig(BaseModel):
    model_config = SECTION

    variant: Literal["mha", "gqa", "mqa"] = "gqa"
    """mha: a key/value head for each query head; gqa: shared by groups; mqa: one for all."""
    num_heads: PositiveInt = 8
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads. Unset: mha num_heads, mqa 1, gqa num_heads // 4 (or the next divisor below)."""
    head_dim: PositiveInt | None = None
    """Width of one head. Unset: d_model // num_heads."""
    dropout: Rate = 0.0
    """Dropout of the attention probabilities; above 0 a slower T x T kernel runs."""
    bias: bool = False
    """Biases on the query, key, value and output projections."""
    mask_type: Literal["causal", "bidirectional", "sliding_window"] = "causal"
    """Which tokens a token sees: those up to itself, all, or the last window_size up to itself."""
    window_size: PositiveInt | None = None
    """sliding_window only: tokens seen, the token itself included."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", _default_kv_heads(self.variant, self.num_heads))
        heads, kv_heads = self.num_heads, known(self.num_kv_heads)
        if self.variant == "mha" and kv_heads != heads:
            raise ValueError(
                f"model.attention.num_kv_heads={kv_heads} differs from model.attention.num_heads={heads}, "
                f"which variant mha can't have: leave it unset, or use model.attention.variant=gqa"
            )
        if self.variant == "mqa" and kv_heads != 1:
            raise ValueError(
                f"model.attention.num_kv_heads={kv_heads}, but variant mqa has 1: leave it unset, or use "
                f"model.attention.variant=gqa"
            )
        if heads % kv_heads:
            raise ValueError(
                f"model.attention.num_kv_heads={kv_heads} does not divide model.attention.num_heads={heads}: "
                f"use {_default_kv_heads('gqa', heads)}"
            )
        if self.mask_type == "sliding_window" and self.window_size is None:
            raise ValueError(
                "model.attention.mask_type=sliding_window needs model.attention.window_size, 256 for example"
            )
        if self.mask_type != "sliding_window" and self.window_size is not None:
            raise ValueError(
                f"model.attention.window_size={self.window_size} has no effect with "
                f"model.attention.mask_type={self.mask_type}: leave it out, or use mask_type=sliding_window"
            )
        return self


class PositionalConfig(BaseModel):
    model_config = SECTION

    encoding: Literal["rope", "sinusoidal", "learned", "none"] = "rope"
    """rope turns queries and keys; sinusoidal and learned are added to the embeddings."""
    rope_base: PositiveFloat = 10000.0
    """rope only: base of the geometric series of wavelengths."""


class FeedForwardConfig(BaseModel):
    model_config = SECTION

    variant: Literal["swiglu", "geglu", "glu", "mlp"] = "swiglu"
    """Gated by SiLU, GELU or a sigmoid; or mlp: linear, activation, linear."""
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


class NormConfig(BaseModel):
    model_config = SECTION

    type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """rmsnorm scales only; layernorm also centres, and has a bias."""
    eps: PositiveFloat = 1e-5
    """Added to the mean square or the variance."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    """Norm before each sub-layer, after its residual sum, or before and after the sub-layer."""


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
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    residual_scaled_init: bool = True
    """Divide the initial weights of projections into the residual stream by sqrt(2 * num_layers) (GPT-2)."""

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
    norm: NormConfig = NormConfig()
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
                    f"{_largest_divisor(self.d_model, heads)} heads, or set model.attention.head_dim"
                )
            update = {"head_dim": self.d_model // heads}
            object.__setattr__(self, "attention", self.attention.model_copy(update=update))
        if self.ffn.d_ff is None:
            wanted, multiple = int(self.ffn.expansion_factor * self.d_model), self.ffn.multiple_of
            update = {"d_ff": max(1, -(-wanted // multiple)) * multiple}
            object.__setattr__(self, "ffn", self.ffn.model_copy(update=update))
        encoding, head_dim = self.positional.encoding, known(self.attention.head_dim)
        if encoding == "rope" and head_dim % 2:
            raise ValueError(
                f"model.positional.encoding=rope turns pairs, but model.attention.head_dim={head_dim} is odd:"
                f" set model.attention.head_dim={head_dim + 1}"
            )
        if encoding == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"model.positional.encoding=sinusoidal needs an even model.d_model, not {self.d_model}: "
                f"use {self.d_model + 1}"
            )
        return self
