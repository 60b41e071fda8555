"""The `model` section of a decoder over the codes of pictures. Imports pydantic only."""

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from model.config import ModelConfig, with_defaults


class ImageCodesConfig(ModelConfig):
    """A decoder that is told a class; its positions are learned unless asked otherwise."""

    type: Literal["image_codes"] = "image_codes"
    """Which model; see `model.models`."""
    vocab_size_multiple: PositiveInt = 1
    """What a vocabulary taken from the data is rounded up to."""
    class_conditional: bool = True
    """Add an embedding of the picture's class to its codes' embeddings."""
    num_classes: PositiveInt | None = None
    """class_conditional only: classes. Unset: those of the data."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        return with_defaults(values, {"positional": {"encoding": "learned"}})

    @model_validator(mode="after")
    def _check_classes(self) -> "ImageCodesConfig":
        if not self.class_conditional and self.num_classes is not None:
            raise ValueError(
                f"model.num_classes={self.num_classes} has no effect with model.class_conditional=false: leave it "
                f"out, or set model.class_conditional=true"
            )
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """The codes, and their class where it is asked for."""
        return ("tokens", "classes") if self.class_conditional else ("tokens",)
