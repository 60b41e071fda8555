"""Which architecture a model is, in either direction."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig
from model.convert.architecture import Architecture
from model.convert.bloom import BLOOM
from model.convert.falcon import FALCON
from model.convert.gpt2 import GPT2
from model.convert.llama import LLAMA, MISTRAL, MIXTRAL, QWEN3
from model.convert.t5 import T5
from model.errors import ConversionError
from model.models import parse_model

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MISTRAL, QWEN3, MIXTRAL, GPT2, FALCON, BLOOM, T5)

_TRAINING_ONLY = (
    "dropout", "attention.dropout", "ffn.dropout", "attention.kernel", "init", "init_std", "residual_scaled_init",
    "vocab_size_multiple", "ffn.expansion_factor", "ffn.multiple_of", "loss",
    "max_source_len",  # of the only one that holds a source, T5, whose positions know no end
    "moe.balance", "moe.load_balance_loss", "moe.router_z_loss", "moe.bias_rate",
)  # fmt: skip
"""Keys without a meaning for the trained model."""


def read_config(theirs: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture and our configuration of a config.json.

    Raises:
        ConversionError: it is of an unknown architecture, or has what ours doesn't.
    """
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    model_type = theirs.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ConversionError(f"model_type={model_type!r} is not known here: {', '.join(known)} are")
    try:
        return known[model_type], parse_model(known[model_type].to_ours(theirs))
    except KeyError as error:
        raise ConversionError(f"config.json has no {error}") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {error.errors()[0]['msg']}") from None


def choose(config: ModelConfig) -> tuple[Architecture, dict[str, Any]]:
    """The first architecture that holds a configuration, and its config.json.

    It holds it where coming back gives the same configuration.

    Raises:
        ConversionError: none does; names the nearest, and what it lacks.
    """
    lacking: dict[str, list[str]] = {}
    for architecture in ARCHITECTURES:
        try:
            theirs = architecture.to_theirs(config)
            back = parse_model(architecture.to_ours(theirs))
        except (ConversionError, ValidationError):
            continue
        if back.type != config.type:
            continue
        lost = differences(config, back)
        if not lost:
            return architecture, {
                "architectures": [architecture.class_name],
                "model_type": architecture.model_type,
            } | theirs
        lacking[architecture.model_type] = lost
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise ConversionError(
        f"no Hugging Face architecture holds this model: the nearest, {nearest}, lacks {', '.join(lacking[nearest])}"
    )


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """`model.KEY=VALUE` of `one` wherever the trained models differ."""
    ours, theirs = _flat(one), _flat(other)
    return [f"model.{key}={value}" for key, value in ours.items() if theirs.get(key) != value]


def _flat(config: ModelConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    tree = config.model_dump()
    if config.readout_scale == config.query_scale == 1.0:
        tree["mup"] = None

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key in _TRAINING_ONLY:
                continue
            if isinstance(value, dict):
                walk(value, f"{key}.")
            else:
                flat[key] = value

    walk(tree, "")
    if flat["attention.variant"] in ("mha", "gqa", "mqa"):  # told apart by num_kv_heads
        flat["attention.variant"] = "softmax"
    return flat
