"""The `model` section of an encoder and decoder. Imports pydantic only."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from model.config import ModelConfig
from model.positional_config import check_positions


class EncoderDecoderConfig(ModelConfig):
    """An encoder that sees the whole source, and a decoder of `num_layers` blocks that looks at it.

    Both are made by the same sections; the encoder's mask is bidirectional, each has positions of its own, and
    cross-attention, softmax attention with the heads of `attention`, has none.
    """

    type: Literal["encoder_decoder"] = "encoder_decoder"
    """Which model; see `model.models`."""
    num_encoder_layers: PositiveInt | None = None
    """Blocks of the encoder. Unset: num_layers."""
    max_source_len: PositiveInt | None = None
    """Longest source, tokens; the encoder's learned positions can't go past it. Unset: the data's, or max_seq_len."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.num_encoder_layers is None:
            object.__setattr__(self, "num_encoder_layers", self.num_layers)
        if self.attention.mask_type == "bidirectional":
            raise ValueError(
                "model.attention.mask_type=bidirectional is the encoder's own; a decoder would see the tokens that "
                "it is to say: use model.attention.mask_type=causal"
            )
        layers = self.encoder.num_layers
        if self.moe is not None and self.moe.first_layer >= layers:
            raise ValueError(
                f"model.moe.first_layer={self.moe.first_layer} leaves no layer with experts in the encoder, since "
                f"model.num_encoder_layers={layers}, counted from 0: use at most {layers - 1}"
            )
        check_positions(self.positional, self.encoder.attention, self.d_model)
        return self

    @property
    def encoder(self) -> ModelConfig:
        """What the encoder's blocks and positions are made by."""
        own = {name: getattr(self, name) for name in ModelConfig.model_fields}
        mask = {"mask_type": "bidirectional", "window_size": None}
        mask |= {"pattern": None, "block_size": None, "summary_size": None}
        return ModelConfig.model_construct(
            **own
            | {
                "type": "transformer",
                "num_layers": self.num_encoder_layers or self.num_layers,
                "max_seq_len": self.max_source_len or self.max_seq_len,
                "attention": self.attention.model_copy(update=mask),
            }
        )

    @property
    def memory_len(self) -> int:
        """Tokens of the source that the decoder's blocks look at."""
        return self.encoder.max_seq_len

    def residual_sums(self, name: str) -> int:
        """Projections into the residual stream that the parameter `name` belongs to."""
        return 2 * self.encoder.num_layers if name.startswith("encoder.") else 3 * self.num_layers

    @property
    def inputs(self) -> tuple[str, ...]:
        """The source, which of it is padding, and the target so far. Padding after the target is seen by no token."""
        return ("source", "source_padding", "tokens")
