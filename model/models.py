"""Every model by its `model.type`. Imports none of them, so that reading a config is fast."""

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import BaseModelConfig

if TYPE_CHECKING:
    from model.model import Model


class Place(NamedTuple):
    """Where the configuration (without torch) and the model are, as MODULE:CLASS."""

    config: str
    model: str


MODELS = {
    "transformer": Place("model.config:ModelConfig", "model.transformer:Transformer"),
    "flow_matching": Place(
        "model.flow_matching.config:FlowMatchingConfig", "model.flow_matching.model:FlowMatching"
    ),
    "encoder_decoder": Place(
        "model.encoder_decoder.config:EncoderDecoderConfig", "model.encoder_decoder.model:EncoderDecoder"
    ),
    "image_codes": Place("model.image_codes.config:ImageCodesConfig", "model.image_codes.model:ImageCodes"),
}


def config_class(model_type: str) -> type[BaseModelConfig]:
    """The class of a `model` section of this type."""
    return _load(MODELS[model_type].config)


def model_class(model_type: str) -> "type[Model]":
    """The class of a model of this type."""
    return _load(MODELS[model_type].model)


def parse_model(section: Any) -> Any:
    """A `model` section as its type's class. What is no mapping is returned as it is.

    Raises ValueError (pydantic's too) where the type is unknown or the section doesn't fit it.
    """
    if not isinstance(section, Mapping):
        return section
    model_type = section.get("type", "transformer")
    if not isinstance(model_type, str) or model_type not in MODELS:
        close = difflib.get_close_matches(str(model_type), MODELS, n=1)
        known = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(MODELS)}"
        raise ValueError(f"model.type={model_type!r} is no model: {known}")
    return config_class(model_type).model_validate(section)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
