"""Flow matching (Lipman et al. 2023) on one-hot tokens. B batch, T sequence, D d_model, V vocabulary.

Noise x0 and data x1 being one-hot, what is seen at time t in [0, 1] is xt = (1 - t) x0 + t x1, or, on the mixture
path (Gat et al. 2024), at each place x1 with probability t, else x0, which is the same on average. The model says
which data it takes this for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cost import Cost, linear_cost
from model.draws import integers, uniform
from model.flow_matching.config import FlowMatchingConfig
from model.loss import IGNORE_INDEX
from model.transformer import LossFunction, Trunk, trunk_cost
from model.weights import Weight, linear_weights

TIME_SCALE = 1000.0
"""The time in units of the fastest sine's radian, so that its 256 values tell times apart."""


class FlowMatching(Trunk):
    """A transformer in front of whose tokens stands one of the time."""

    config: FlowMatchingConfig
    prefix_length = 1
    entrance = ("embedding", "embedding_norm", "time")

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__(config)
        self.time = TimeEmbedding(config)

    def forward(
        self, t: Tensor, xt: Tensor, targets: Tensor | None = None, *, loss_func: LossFunction | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Times (B,) in [0, 1], distributions (B, T, V) -> logits of the data, (B, T, V).

        With targets, distributions (B, T, V) or tokens (B, T): (logits, loss), the mean cross-entropy, or what
        loss_func(logits (B * T, V), targets (B * T, ...)) returns.
        """
        if loss_func is None and targets is not None and targets.is_floating_point():
            loss_func = F.cross_entropy
        return self._logits(self._run(self.embed(xt), prefix=self.time(t)), targets, loss_func=loss_func)

    def loss_sum(self, seeds: Tensor, targets: Tensor) -> Tensor:
        """Sum over scored tokens of -log of what the model gives the data at a random time, ().

        seeds (B,) int64 fix the draws of each sequence; targets (B, T) are the data, and noise alone stands
        where they are IGNORE_INDEX. Embedding is linear, so that the tokens' embeddings are interpolated, and
        nothing of size (B, T, V) is made.
        """
        return self.finish(self.middle(self.start(seeds, targets)), targets)

    def start(self, seeds: Tensor, targets: Tensor) -> Tensor:
        """What of loss_sum comes before the blocks."""
        t, noise = self.draw(seeds, targets.shape[1])
        data = targets.where(targets != IGNORE_INDEX, noise)
        if self.config.path == "mixture":
            arrived = uniform(seeds, targets.shape[1], stream=2) < t.unsqueeze(1)
            between = self.embed(data.where(arrived, noise))
        else:
            start = self.embed(noise)
            between = torch.lerp(start, self.embed(data), t.to(start.dtype)[:, None, None])
        return self._enter(between, prefix=self.time(t))

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        return {"seeds": torch.zeros(batch, dtype=torch.int64)}

    def draw(self, seeds: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Times (B,) fp64 and noise (B, length) int64, by sequence."""
        noise = integers(seeds, length, self.embedding.num_embeddings)
        return uniform(seeds, 1, stream=1).squeeze(1), noise

    @torch.no_grad()
    def sample(self, t: Tensor, xt: Tensor, temperature: float = 1.0) -> Tensor:
        """Times (B,), distributions (B, T, V) -> logits / temperature (B, T, V), without dropout.

        Raises ValueError unless the temperature is above 0.
        """
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: it must be above 0, 1.0 for the model's own")
        training = self.training
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                return self(t, xt) / temperature
        finally:
            self.train(training)

    @staticmethod
    def cost(config: FlowMatchingConfig, seq_len: int) -> Cost:
        """The time's token is shared out over the sequence's others."""
        plain, longer = trunk_cost(config, seq_len), trunk_cost(config, seq_len + 1)
        head = linear_cost(config.d_model, config.vocab_size or 0).flops
        time = TimeEmbedding.cost(config)
        flops = head + (longer.flops - head) * (seq_len + 1) / seq_len + time.flops / seq_len
        return Cost(plain.parameters + time.parameters, plain.embedding, plain.idle, flops)


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time through an MLP with SiLU."""

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.width = config.time_embed_dim
        self.up = nn.Linear(self.width, config.d_model)
        self.down = nn.Linear(config.d_model, config.d_model)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 1, D)."""
        dtype = self.up.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        places = torch.arange(0, self.width, 2, device=t.device, dtype=wide)
        angles = torch.outer(TIME_SCALE * t.to(wide), 10000.0 ** (-places / self.width))
        waves = torch.cat((angles.sin(), angles.cos()), dim=1).to(dtype)
        return self.down(F.silu(self.up(waves))).unsqueeze(1)

    def weights(self) -> dict[str, Weight]:
        up = linear_weights("up", self.up, "replicated", wide="out")
        return up | linear_weights("down", self.down, "replicated")

    @staticmethod
    def cost(config: FlowMatchingConfig) -> Cost:
        return linear_cost(config.time_embed_dim, config.d_model, bias=True) + linear_cost(
            config.d_model, config.d_model, bias=True
        )
