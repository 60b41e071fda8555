"""The dial: from a size or a compute budget to a compute-optimal run, each value with its reason.

What a layer of the configuration says along with the dial, or a later one, stays; what was said before is replaced.
"""

from typing import Any

from model.config import ModelConfig
from model.count import flops_per_token
from model.dotted import Values, put
from train.config import Config, DialConfig
from train.counts import format_count
from train.errors import ConfigError
from train.scaling import recommend
from train.scaling.shape import Shape, flops_of, params_of, resized, shape_of, shape_of_depth

OTHER_ENDS = ("run.steps", "schedule.total_steps")
"""Of a run that is not the dial's."""


def turned(values: Values, config: Config, dial: DialConfig, said: Values) -> Values:
    """The values with those of the dial among them.

    `config`: the values' own; `said`: which of them stay.

    Raises:
        ConfigError: the model can't be sized so.
    """
    base, because = config.model, _shown(dial)
    if not isinstance(base, ModelConfig) or base.type == "encoder_decoder":
        raise ConfigError(
            f"{because} can't size a model of type {base.type}: use a decoder, or set its keys one by one"
        )
    if base.vocab_size is None:
        raise ConfigError(
            f"{because} must know the vocabulary: set model.vocab_size to that of {config.data.path}"
        )
    if base.mup is not None and "optimizer.lr" not in said:
        raise ConfigError(
            f"{because} takes optimizer.lr from a law of the standard parametrization, but model.mup takes one "
            f"that was found at model.d_model={base.mup.base_width}: set optimizer.lr to that along with the dial"
        )
    shape = _shape(base, dial, because)
    model = resized(base, shape)
    for key in shape:
        if f"model.{key}" in said:
            place = f"model.{key}={said[f'model.{key}'][0]}"
            raise ConfigError(f"{place} and {because} both set the model's size: leave one of them out")
    size = f"{format_count(params_of(model))} parameters"
    set_by_dial = {f"model.{key}": (value, size) for key, value in shape.items()}
    set_by_dial |= _training(config, model, dial, said)
    result = {key: value for key, value in values.items() if key not in OTHER_ENDS or key in said}
    for key, (value, reason) in set_by_dial.items():
        if key not in said:
            put(result, key, value, f"{because}: {reason}")
    return result


def _shape(base: ModelConfig, dial: DialConfig, because: str) -> Shape:
    if dial.depth is not None:
        return shape_of_depth(base, dial.depth)
    try:
        if dial.params is not None:
            return shape_of(base, dial.params, params_of)
        assert dial.flops is not None
        return shape_of(base, dial.flops, lambda model: flops_of(model, dial.tokens_per_param))
    except ValueError as error:
        raise ConfigError(
            f"{because} with model.vocab_size={base.vocab_size} is out of reach: {error}"
        ) from None


def _training(
    config: Config, model: ModelConfig, dial: DialConfig, said: Values
) -> dict[str, tuple[Any, str]]:
    """Key -> value and reason, of tokens, batch, learning rate and warm-up."""
    params, per_token = params_of(model), flops_per_token(model, model.max_seq_len)
    tokens, reason = (
        dial.tokens_per_param * params,
        f"{dial.tokens_per_param:g} for each of {params:.3g} parameters",
    )
    if dial.flops is not None:
        tokens, reason = dial.flops / per_token, f"{per_token:.3g} FLOPs each"
    found: dict[str, tuple[Any, str]] = {}
    if not {"run.steps", "run.tokens"} & said.keys():
        found["run.tokens"] = (max(1, round(tokens)), reason)
    elif config.run.tokens is not None:
        tokens = config.run.tokens
    flops = tokens * per_token
    law = f"of C={flops:.3g} FLOPs, DeepSeek LLM 2024"
    batch = recommend.batch_sequences(flops, model.max_seq_len)
    found["data.global_batch_size"] = (
        batch,
        f"{recommend.batch_tokens(flops):.3g} tokens, 0.2920 C^0.3271 {law}",
    )
    batch = config.data.global_batch_size if "data.global_batch_size" in said else batch
    if batch % config.data.micro_batch_size:
        found["data.micro_batch_size"] = (
            min(batch, 2 ** (config.data.micro_batch_size.bit_length() - 1)),
            "fills it",
        )
    steps = tokens / (batch * model.max_seq_len)
    if config.run.steps is not None and "run.steps" in said:
        steps = config.run.steps
    found["optimizer.lr"] = (
        float(f"{recommend.peak_learning_rate(flops):.3g}"),
        f"0.3118 max(C, 1e17)^-0.1250 {law}",
    )
    found["schedule.warmup_steps"] = (
        recommend.warmup_steps(steps),
        f"a twentieth of {steps:.0f} steps, up to 2,000",
    )
    return found


def _shown(dial: DialConfig) -> str:
    """As it would be written."""
    size = {
        "params": dial.params and format_count(dial.params),
        "depth": dial.depth,
        "flops": dial.flops and f"{dial.flops:.3g}",
    }
    return " ".join(f"dial.{name}={value}" for name, value in size.items() if value is not None)
