"""Embedding and head, each rank having some rows of the vocabulary. B batch, T sequence, D d_model, V vocabulary."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.config import LossConfig
from model.loss import Rows, token_loss_sum
from model.vocabulary import Vocabulary
from parallel.collectives import add, copy, join, share


class SharedVocabulary(Vocabulary):
    """Weights have this rank's share of the rows; what goes in and comes out is whole, and the same on all ranks."""

    def __init__(self, vocab_size: int, group: dist.ProcessGroup) -> None:
        self.group = group
        self.vocab_size = vocab_size
        self.start, self.stop = share(vocab_size, group)

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return add(tokens[..., self.start : self.stop] @ weight, self.group)
        here = (tokens >= self.start) & (tokens < self.stop)
        rows = F.embedding((tokens - self.start).where(here, 0), weight)
        return add(rows * here.unsqueeze(-1), self.group)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return join(F.linear(copy(hidden, self.group), weight), self.vocab_size, self.group, dim=-1)

    def loss_sum(self, hidden: Tensor, weight: Tensor, targets: Tensor, config: LossConfig) -> Tensor:
        most = -(-self.vocab_size // self.group.size())
        rows = Rows(self.start, self.vocab_size, most, self._maximum, self._total)
        return token_loss_sum(copy(hidden, self.group), weight, targets, config, rows)

    @torch.no_grad()
    def _maximum(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers

    @torch.no_grad()
    def _total(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers, group=self.group)
        return numbers
