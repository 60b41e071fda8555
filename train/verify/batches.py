"""The batches of a trial: made of a seed, in memory, so that no data set is needed. B batch, T sequence."""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from data.stream import Batch
from model.config import BaseModelConfig, known
from model.loss import IGNORE_INDEX
from train.errors import ConfigError

COLUMNS = ("tokens", "seeds", "classes", "source", "source_padding")


@dataclass(frozen=True)
class Batches:
    """Global batches as functions of (seed, step), as a run's are; a sequence is a function of (seed, id)."""

    model: BaseModelConfig
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Raises ConfigError where the model takes what there is not."""
        unknown = set(self.model.inputs) - set(COLUMNS)
        if unknown:
            raise ConfigError(
                f"model.type={self.model.type} takes {', '.join(sorted(unknown))}, but what can be made up for it is "
                f"{', '.join(COLUMNS)}"
            )

    def order(self, step: int) -> Tensor:
        """The ids of a step's sequences, (B,) int64."""
        first = step * self.global_batch_size
        return first + torch.randperm(self.global_batch_size, generator=self._generator(f"order/{step}"))

    def share(self, step: int, rank: int, ranks: int) -> Batch:
        """What one of so many data-parallel ranks has of a step's batch."""
        ids = self.order(step).chunk(ranks)[rank]
        rows = self._tokens("tokens", ids, self.model.max_seq_len + 1)
        source = self._tokens("source", ids, getattr(self.model, "max_source_len", 1))
        columns = {
            "tokens": rows[:, :-1],
            "seeds": self._tokens("seeds", ids, 1).squeeze(1) + ids * known(self.model.vocab_size),
            "classes": ids % (getattr(self.model, "num_classes", None) or 1),
            "source": source,
            "source_padding": _from_place(1 + ids % source.shape[1], source.shape[1]),
        }
        # of every sequence other numbers of targets are scored, so that a mean of means would show
        length = self.model.max_seq_len
        targets = rows[:, 1:].masked_fill(_from_place(1 + ids % length, length), IGNORE_INDEX)
        return Batch({name: columns[name] for name in self.model.inputs}, targets, ids)

    def _tokens(self, column: str, ids: Tensor, length: int) -> Tensor:
        """(B, length), random."""
        size = (length,)
        rows = [
            torch.randint(known(self.model.vocab_size), size, generator=self._generator(f"{column}/{sample}"))
            for sample in ids.tolist()
        ]
        return torch.stack(rows)

    def _generator(self, what: str) -> torch.Generator:
        digest = blake2b(f"{self.seed}/{what}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _from_place(starts: Tensor, length: int) -> Tensor:
    """(B,) -> (B, length), True from each start on."""
    return torch.arange(length) >= starts.unsqueeze(1)
