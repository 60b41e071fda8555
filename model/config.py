"""The `model` section of the configuration. Imports pydantic only, so that reading a config is fast."""

from typing import Literal, Self

from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from model.moe_config import MoEConfig
from model.section import SECTION, Rate, known, largest_divisor

__all__ = [
    "AttentionConfig",
    "FeedForwardConfig",
    "LossConfig",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "PositionalConfig",
    "known",
]


def _default_kv_heads(variant: str, num_heads: int) -> int:
    if variant == "mha":
        return num_heads
    return 1 if variant == "mqa" else largest_divisor(num_heads, num_heads // 4)


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


class ModelConfig(BaseModel):
    """A decoder. Values left unset are filled in here, so that what is shown and saved is complete."""

    model_config = SECTION

    type: Literal["transformer"] = "transformer"
    """Which model: the decoder."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. Unset: the tokenizer's, rounded up to vocab_size_multiple."""
    vocab_size_multiple: PositiveInt = 128
    """What a vocabulary taken from the tokenizer is rounded up to."""
    d_model: PositiveInt = 512
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Blocks."""
    max_seq_len: PositiveInt = 2048
    """Longest sequence in training, tokens; learned positions can't go past it."""
    attention: AttentionConfig = AttentionConfig()
    positional: PositionalConfig = PositionalConfig()
    ffn: FeedForwardConfig = FeedForwardConfig()
    moe: MoEConfig | None = None
    """Unset: every feed-forward layer is dense."""
    norm: NormConfig = NormConfig()
    loss: LossConfig = LossConfig()
    tie_embeddings: bool = True
    """One matrix for the embedding and the head."""
    parallel_layers: bool = False
    """Attention and feed-forward side by side on the same normalized input (PaLM, GPT-J)."""
    dropout: Rate = 0.0
    """Dropout of the embeddings and of each sub-layer's output."""
    init: Literal["gpt2", "xavier"] = "gpt2"
    """gpt2: normal weights; xavier: uniform ones for linear layers, by their widths, normal embeddings."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of normal initial weights."""
    residual_scaled_init: bool = True
    """Divide the initial weights of projections into the residual stream by sqrt(2 * num_layers) (GPT-2)."""

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

    @property
    def moe_layers(self) -> range:
        """The layers with experts, counted from 0."""
        if self.moe is None:
            return range(0)
        return range(self.moe.first_layer, self.num_layers, self.moe.every_nth_layer)
