"""The optimizer: AdamW with decay on what declares it, and a learning rate by width."""

from collections import defaultdict

import torch
from torch import nn

from model.config import BaseModelConfig
from model.weights import declared_weights
from train.config import OptimizerConfig


def make_optimizer(
    model: nn.Module, model_config: BaseModelConfig, config: OptimizerConfig
) -> torch.optim.AdamW:
    """Fused AdamW. Linear weights and embeddings decay; biases, norms and the like don't.

    Weights that learn slower by their `rate` decay as fast as the others. Such groups have their part of the learning
    rate as `lr_scale`.
    """
    declared = declared_weights(model)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        weight = declared[name]
        groups[weight.decays, weight.rate(model_config)].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay / scale if decays else 0.0,
                "lr": config.lr * scale,
                "lr_scale": scale,
            }
            for (decays, scale), parameters in groups.items()
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
