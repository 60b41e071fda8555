"""From a configuration to a model."""

from model.config import ModelConfig
from model.transformer import Transformer

MODELS: dict[str, type[Transformer]] = {"transformer": Transformer}


def build_model(config: ModelConfig) -> Transformer:
    """The model that `config.type` names, on torch's default device and dtype (see `initialize` for weights).

    Raises ValueError if `config.vocab_size` is unset.
    """
    return MODELS[config.type](config)
