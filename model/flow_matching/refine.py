"""From noise to tokens in some steps. B batch, T sequence, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flow_matching.model import FlowMatching


@torch.no_grad()
def refine(
    model: FlowMatching,
    noise: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    prompt: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Noise, tokens (B, T) int64 -> tokens (B, T) after `steps` steps; of a sharded model, by all ranks together.

    Euler's method along the flow dx/dt = (what the model takes the data for - x) / (1 - t), from the noise at
    t = 0 to t = 1, where the likeliest tokens are taken. prompt (B, P): the first tokens, which are known.
    vocab_size: only tokens below it are made, since the model's own may be padded.
    Raises ValueError unless steps and temperature are above 0.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: it must be 1 or more")
    dtype, size = model.embedding.weight.dtype, model.embedding.num_embeddings
    start = F.one_hot(noise, size).to(dtype)
    known = None if prompt is None else F.one_hot(prompt, size).to(dtype)
    xt = start
    for step in range(steps):
        now, then = step / steps, (step + 1) / steps
        logits = model.sample(torch.full((len(noise),), now, device=noise.device), xt, temperature)
        if vocab_size is not None:
            logits[..., vocab_size:] = -torch.inf
        xt = torch.lerp(xt, logits.softmax(dim=-1), (then - now) / (1 - now))
        if known is not None:
            xt[:, : known.shape[1]] = torch.lerp(start[:, : known.shape[1]], known, then)
    return xt.argmax(dim=-1)
