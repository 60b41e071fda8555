"""The `model.positional` section of the configuration, and which attention it fits."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from model.attention_config import AttentionConfig
from model.section import SECTION, known

SCALING_KEYS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ntk": {},
    "yarn": {"original_max_seq_len": None, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None},
    "llama3": {"original_max_seq_len": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""What each type of scaling reads beside the factor, and its defaults."""


class RopeScaling(BaseModel):
    """Rotary frequencies made slower, for sequences longer than those of an earlier training."""

    model_config = SECTION

    type: Literal["linear", "ntk", "yarn", "llama3"] = "linear"
    """linear: all frequencies divided by factor (Chen et al. 2023). ntk: the base raised so that the slowest
    is. yarn: only those that turn seldom, with hotter scores (Peng et al. 2023). llama3: only those of
    wavelengths beyond the original length (Llama 3.1)."""
    factor: Annotated[float, Field(gt=1.0)]
    """How much longer sequences get."""
    original_max_seq_len: PositiveInt | None = None
    """yarn, llama3: the sequence length before scaling, tokens. Unset: max_seq_len / factor."""
    beta_fast: PositiveFloat | None = None
    """yarn: frequencies that turn more often than this within the original length stay (32)."""
    beta_slow: PositiveFloat | None = None
    """yarn: those that turn less often than this are divided by the factor (1)."""
    attention_factor: PositiveFloat | None = None
    """yarn: what queries and keys are multiplied by. Unset: 0.1 ln(factor) + 1."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above the original length over this are multiplied by the factor (1)."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths below the original length over this stay (4)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys = SCALING_KEYS[self.type]
        for key in type(self).model_fields.keys() - {"type", "factor"}:
            if key not in keys and getattr(self, key) is not None:
                raise ValueError(
                    f"model.positional.rope_scaling.{key} has no effect with "
                    f"model.positional.rope_scaling.type={self.type}: leave it out"
                )
        for key, default in keys.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, default)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if high in keys and getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.positional.rope_scaling.{low}={getattr(self, low)} must be below "
                    f"model.positional.rope_scaling.{high}={getattr(self, high)}"
                )
        return self


def _scaling(value: Any) -> Any:
    """A bare number means linear scaling by it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"type": "linear", "factor": value} if is_number else value


class PositionalConfig(BaseModel):
    model_config = SECTION

    encoding: Literal["rope", "alibi", "relative", "sinusoidal", "learned", "none"] = "rope"
    """rope turns queries and keys; alibi and relative add to the scores, by distance; sinusoidal and learned
    are added to the embeddings."""
    rope_base: PositiveFloat = 10000.0
    """rope only: base of the geometric series of wavelengths."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """rope only: the part of each head's dims that turns, rounded down to whole pairs; the rest stays."""
    rope_scaling: Annotated[RopeScaling | None, BeforeValidator(_scaling)] = None
    """rope only: how frequencies are slowed down for longer sequences. A number means type linear."""
    relative_buckets: PositiveInt = 32
    """relative only: distances told apart, each with a learned number for each head."""
    relative_max_distance: PositiveInt = 128
    """relative only: distances from here on share a bucket."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, encoding in (
            ("rope_fraction", "rope"),
            ("rope_scaling", "rope"),
            ("relative_buckets", "relative"),
            ("relative_max_distance", "relative"),
        ):
            if self.encoding != encoding and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"model.positional.{key} has no effect with model.positional.encoding={self.encoding}: leave "
                    f"it out, or use model.positional.encoding={encoding}"
                )
        return self

    def resolved(self, max_seq_len: int) -> Self:
        """With the length before scaling filled in."""
        scaling = self.rope_scaling
        if (
            scaling is None
            or "original_max_seq_len" not in SCALING_KEYS[scaling.type]
            or scaling.original_max_seq_len is not None
        ):
            return self
        original = max(1, int(max_seq_len / scaling.factor))
        return self.model_copy(
            update={"rope_scaling": scaling.model_copy(update={"original_max_seq_len": original})}
        )


def rope_width(positional: PositionalConfig, attention: AttentionConfig) -> int:
    """Dims of a head that turn: of its real ones, or of the 2 * head_dim of complex attention."""
    width = known(attention.head_dim) * (2 if attention.variant == "complex" else 1)
    return int(width * positional.rope_fraction) // 2 * 2


def check_positions(positional: PositionalConfig, attention: AttentionConfig, d_model: int) -> None:
    """Raise ValueError where positions and attention can't work together."""
    encoding, head_dim = positional.encoding, known(attention.head_dim)
    if encoding == "rope" and head_dim % 2 and attention.variant != "complex":
        raise ValueError(
            f"model.positional.encoding=rope turns pairs, but model.attention.head_dim={head_dim} is odd:"
            f" set model.attention.head_dim={head_dim + 1}"
        )
    if encoding == "rope" and rope_width(positional, attention) == 0:
        raise ValueError(
            f"model.positional.rope_fraction={positional.rope_fraction} of model.attention.head_dim={head_dim} is "
            f"less than a pair: use {2 / head_dim:g} or more, or model.positional.encoding=none"
        )
    if encoding == "rope" and attention.variant == "complex" and positional.rope_fraction != 1.0:
        raise ValueError(
            "model.positional.rope_fraction can't cut complex numbers apart (model.attention.variant=complex): "
            "leave it out, or use model.attention.variant=gqa"
        )
    scaling = positional.rope_scaling
    if scaling is not None and scaling.type == "ntk" and rope_width(positional, attention) == 2:
        raise ValueError(
            "model.positional.rope_scaling.type=ntk slows down all pairs of a head but the first, and there is one:"
            " use model.positional.rope_scaling.type=linear"
        )
    if encoding == "sinusoidal" and d_model % 2:
        raise ValueError(
            f"model.positional.encoding=sinusoidal needs an even model.d_model, not {d_model}: "
            f"use {d_model + 1}"
        )
    if encoding in ("alibi", "relative") and attention.variant == "linear":
        raise ValueError(
            f"model.positional.encoding={encoding} adds to scores, which model.attention.variant=linear never "
            f"makes: use model.positional.encoding=rope, or model.attention.variant=gqa"
        )
    if encoding == "relative":
        _check_buckets(positional, attention)


def _check_buckets(positional: PositionalConfig, attention: AttentionConfig) -> None:
    sides = 2 if attention.mask_type == "bidirectional" else 1
    exact = positional.relative_buckets // sides // 2
    if positional.relative_buckets % (2 * sides) or exact >= positional.relative_max_distance:
        raise ValueError(
            f"model.positional.relative_buckets={positional.relative_buckets} must be a multiple of {2 * sides}, "
            f"and less than {2 * sides} * model.positional.relative_max_distance="
            f"{positional.relative_max_distance}: use 32 and 128"
        )
