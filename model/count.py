"""Parameters and FLOPs of a model, from its configuration alone."""

from typing import NamedTuple

from model.config import BaseModelConfig
from model.models import model_class


class ParameterCount(NamedTuple):
    """embedding: the look-up tables of tokens and learned positions; an untied head is not one.

    active: all but the experts that a token is not routed to.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int


def parameter_count(config: BaseModelConfig) -> ParameterCount:
    """Parameters of `build_model(config)`, a tied weight once."""
    cost = model_class(config.type).cost(config, config.max_seq_len)
    active = cost.parameters - cost.idle
    return ParameterCount(cost.parameters, cost.embedding, cost.parameters - cost.embedding, active)


def flops_per_token(config: BaseModelConfig, seq_len: int) -> float:
    """FLOPs of one token's forward and backward (3 forwards) in sequences of `seq_len`.

    Matrix multiplications and attention, 2 per multiply-add; causal attention counts half of the square, a
    window its band; of experts those that a token is routed to.
    """
    return 3 * model_class(config.type).cost(config, seq_len).flops
