"""From a configuration to a model."""

from model.config import BaseModelConfig
from model.model import Model
from model.models import model_class


def build_model(config: BaseModelConfig) -> Model:
    """The model that `config.type` names, on torch's default device and dtype (see `initialize` for weights).

    Raises ValueError if `config.vocab_size` is unset.
    """
    return model_class(config.type)(config)
