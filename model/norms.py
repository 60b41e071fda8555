"""Normalizations over the last dim."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class ScaleNorm(nn.Module):
    """g * x / |x| with one learned g (Nguyen and Salazar 2019), g being sqrt(D) * weight, sqrt(D) at first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm.eps
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "ones")}

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        return Cost(parameters=1)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"


NORMS: dict[str, type[RMSNorm] | type[LayerNorm] | type[ScaleNorm]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "scalenorm": ScaleNorm,
}
