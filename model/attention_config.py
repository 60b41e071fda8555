"""The `model.attention` section of the configuration."""

from typing import Literal, Self

from pydantic import BaseModel, PositiveFloat, PositiveInt, model_validator

from model.section import SECTION, Rate, known, largest_divisor

WINDOWED = ("sliding_window", "local")


def _default_kv_heads(variant: str, num_heads: int) -> int:
    if variant == "gqa":
        return largest_divisor(num_heads, num_heads // 4)
    return 1 if variant == "mqa" else num_heads


class AttentionConfig(BaseModel):
    model_config = SECTION

    variant: Literal["mha", "gqa", "mqa", "complex", "linear"] = "gqa"
    """mha: a key/value head for each query head; gqa: shared by groups; mqa: one for all; complex: queries
    and keys are complex; linear: a feature map in place of the softmax, O(T)."""
    num_heads: PositiveInt = 8
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads. Unset: mqa 1, gqa num_heads // 4 (or the next divisor below), else num_heads."""
    head_dim: PositiveInt | None = None
    """Width of one head (complex: that many complex numbers). Unset: d_model // num_heads."""
    dropout: Rate = 0.0
    """Dropout of the attention probabilities; above 0 a slower T x T kernel runs."""
    bias: bool = False
    """Biases on the query, key, value and output projections."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, before they are rotated."""
    logit_soft_cap: PositiveFloat | None = None
    """Scores become cap * tanh(score / cap). kernel=auto takes flex on CUDA (naive with dropout, in fp64 or
    with head_dim under 16), else naive."""
    mask_type: Literal["causal", "bidirectional", "sliding_window", "local", "block_sparse"] = "causal"
    """Which tokens a token sees. causal: those up to itself. bidirectional: all. sliding_window: the last
    window_size up to itself. local: those up to itself in its own block of window_size tokens and in the
    block before it, blocks counted from the first token. block_sparse: see pattern."""
    window_size: PositiveInt | None = None
    """sliding_window: tokens seen, the token itself included. local: tokens of a block."""
    pattern: Literal["strided", "fixed"] | None = None
    """block_sparse only, as in Sparse Transformers. strided (the default): the last block_size tokens up to
    itself, and every block_size-th token before them. fixed: those up to itself in its block of block_size
    tokens, and the last summary_size tokens of every block before it."""
    block_size: PositiveInt | None = None
    """block_sparse only: the stride, or the tokens of a block."""
    summary_size: PositiveInt | None = None
    """pattern=fixed only: tokens of a block that later blocks see. Unset: block_size // 8, at least 1."""
    kernel: Literal["auto", "flash", "flex", "naive"] = "auto"
    """flash: torch's scaled_dot_product_attention; flex: flex_attention, which skips masked blocks, needs
    no T x T tensor for any mask or bias, and can't train on CPU; naive: T x T scores, the reference. auto:
    flex on CUDA where flash would need a T x T tensor, else flash, or naive under a logit_soft_cap.
    linear attention has auto (a scan over chunks) and naive (its quadratic form).
    While generating with a cache, flash or naive stands in for flex."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_heads()
        self._check_mask()
        if self.variant == "linear":
            self._check_linear()
        if self.logit_soft_cap is not None and self.kernel == "flash":
            raise ValueError(
                "model.attention.kernel=flash can't cap scores (model.attention.logit_soft_cap): use "
                "model.attention.kernel=auto, flex or naive"
            )
        if self.dropout > 0 and self.kernel == "flex":
            raise ValueError(
                "model.attention.kernel=flex has no dropout: set model.attention.dropout=0.0, or use "
                "model.attention.kernel=auto"
            )
        return self

    def _check_heads(self) -> None:
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

    def _check_mask(self) -> None:
        mask_type, sparse = self.mask_type, self.mask_type == "block_sparse"
        if mask_type in WINDOWED and self.window_size is None:
            raise ValueError(
                f"model.attention.mask_type={mask_type} needs model.attention.window_size, 256 for example"
            )
        if mask_type not in WINDOWED and self.window_size is not None:
            raise ValueError(
                f"model.attention.window_size={self.window_size} has no effect with "
                f"model.attention.mask_type={mask_type}: leave it out, or use mask_type=sliding_window"
            )
        if sparse and self.block_size is None:
            raise ValueError(
                "model.attention.mask_type=block_sparse needs model.attention.block_size, 128 for example"
            )
        if sparse and self.pattern is None:
            object.__setattr__(self, "pattern", "strided")
        if self.pattern == "fixed" and self.summary_size is None:
            object.__setattr__(self, "summary_size", max(1, (self.block_size or 1) // 8))
        for key, needed, fine in (
            ("pattern", "mask_type=block_sparse", sparse),
            ("block_size", "mask_type=block_sparse", sparse),
            ("summary_size", "pattern=fixed", self.pattern == "fixed"),
        ):
            value = getattr(self, key)
            if value is not None and not fine:
                raise ValueError(
                    f"model.attention.{key}={value} has no effect without model.attention.{needed}: leave it out"
                )
        if sparse and (self.summary_size or 0) > known(self.block_size):
            raise ValueError(
                f"model.attention.summary_size={self.summary_size} is more than the "
                f"{self.block_size} tokens of a block (model.attention.block_size)"
            )

    def _check_linear(self) -> None:
        for key, fine, reason, fix in (
            ("mask_type", self.mask_type in ("causal", "bidirectional"), "its state is a sum", "=causal"),
            ("kernel", self.kernel in ("auto", "naive"), "it has no softmax", "=auto"),
            ("dropout", self.dropout == 0, "it makes no probabilities", "=0.0"),
            ("logit_soft_cap", self.logit_soft_cap is None, "it makes no scores", " unset"),
        ):
            if not fine:
                raise ValueError(
                    f"model.attention.variant=linear can't have model.attention.{key}={getattr(self, key)}, since "
                    f"{reason}: use model.attention.{key}{fix}, or model.attention.variant=gqa"
                )
