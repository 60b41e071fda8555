"""Normalizations over the last dim."""

from torch import nn

from model.config import ModelConfig
from model.cost import Cost
from model.weights import Weight


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (Zhang and Sennrich 2019): x / rms(x) * weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, eps=config.norm.eps)

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "ones")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        return Cost(parameters=config.d_model)


class LayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, eps=config.norm.eps)

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "ones"), "bias": Weight("replicated", "zeros")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        return Cost(parameters=2 * config.d_model)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
