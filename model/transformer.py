"""The decoder, and what all transformers share. B batch, T sequence, D d_model, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.cache import KeyValueCache
from model.config import ModelConfig, known
from model.cost import Cost, linear_cost
from model.loss import IGNORE_INDEX, token_loss_sum
from model.masks import make_mask
from model.model import Model
from model.norms import NORMS
from model.positions import POSITIONS
from model.weights import Weight


class Trunk(Model):
    """Embedding, blocks, norm, head. A tied head is the embedding's weight, without a module.

    With norm placement post there is no last norm, since every block ends in one.
    Weights are torch's defaults until `model.initialize.initialize` fills them.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is unset: give the tokenizer's size, 32000 for example")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = POSITIONS[config.positional.encoding](config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = None if config.norm.placement == "post" else NORMS[config.norm.type](config)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64, or distributions over the vocabulary (B, T, V) -> (B, T, D)."""
        return tokens @ self.embedding.weight if tokens.is_floating_point() else self.embedding(tokens)

    def _hidden(
        self, embeddings: Tensor, cache: KeyValueCache | None = None, *, prefix: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, T, D) -> (B, T, D), ready for the head.

        prefix (B, P, D): what is put before the first token, at no position, and left out again at the end.
        """
        offset = 0 if cache is None else cache.length
        x = self.positions.embed(embeddings, offset)
        if prefix is not None:
            x = torch.cat((prefix, x), dim=1)
        x = F.dropout(x, self.config.dropout, self.training)
        rotation = self.positions.rotation(x, offset)
        mask = make_mask(self.config.attention, x.shape[1], offset + x.shape[1], x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, mask, rotation, None if cache is None else cache.layers[index])
        x = x if prefix is None else x[:, prefix.shape[1] :]
        return x if self.norm is None else self.norm(x)

    def _logits(
        self, hidden: Tensor, targets: Tensor | None, last_only: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, T, D) -> logits (B, T, V), or (B, 1, V); with targets (B, T) also the mean loss, fp32 or fp64."""
        logits = F.linear(hidden[:, -1:] if last_only else hidden, self._head_weight())
        if targets is None:
            return logits
        flat = logits.flatten(0, 1)
        if flat.dtype.itemsize < 4:
            flat = flat.float()
        return logits, F.cross_entropy(flat, targets.flatten(0, 1), ignore_index=IGNORE_INDEX)

    def _loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the token losses of (B, T, D) over targets (B, T)."""
        return token_loss_sum(hidden.flatten(0, 1), self._head_weight(), targets.flatten())

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def weights(self) -> dict[str, Weight]:
        weights = {"embedding.weight": Weight("vocabulary", "normal")}
        if self.head is not None:
            weights["head.weight"] = Weight("vocabulary", "normal")
        return weights

    def __repr__(self) -> str:
        config, attention = self.config, self.config.attention
        cost = self.cost(config, config.max_seq_len)
        parts = [
            f"{attention.variant} {attention.num_heads}/{attention.num_kv_heads} heads",
            config.positional.encoding,
            f"{config.ffn.variant} d_ff {config.ffn.d_ff}",
            f"{config.norm.type} {config.norm.placement}" + (" parallel" if config.parallel_layers else ""),
            "tied" if config.tie_embeddings else "untied",
        ]
        total, rest = _in_words(cost.parameters), _in_words(cost.parameters - cost.embedding)
        settings = ", ".join(parts)
        return f"{type(self).__name__}({total} parameters, {rest} non-embedding; {settings})\n{super().__repr__()}"


class Transformer(Trunk):
    """The decoder: from tokens to the logits of the next ones."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only, in the weights' dtype.

        For tokens also distributions over the vocabulary, (B, T, V).
        With targets (B, T) int64: (logits, loss), the mean over targets that are not IGNORE_INDEX.
        With a cache: tokens go on from those that the cache holds.
        Raises ValueError past the learned positions.
        """
        return self._logits(self._hidden(self.embed(tokens), cache), targets, last_only)

    def loss_sum(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the token losses over targets (B, T) that are not IGNORE_INDEX, for tokens (B, T).

        A scalar in fp32 (fp64 for fp64 weights). Never holds more logits than a chunk's.
        """
        return self._loss_sum(self._hidden(self.embed(tokens)), targets)

    @staticmethod
    def cost(config: ModelConfig, seq_len: int) -> Cost:
        return trunk_cost(config, seq_len)


def trunk_cost(config: ModelConfig, seq_len: int) -> Cost:
    """Of what all transformers share."""
    table = known(config.vocab_size) * config.d_model
    head = linear_cost(config.d_model, known(config.vocab_size))
    cost = Cost(parameters=table, embedding=table) + POSITIONS[config.positional.encoding].cost(config)
    cost += Block.cost(config, seq_len) * config.num_layers
    cost += Cost(flops=head.flops) if config.tie_embeddings else head
    return cost if config.norm.placement == "post" else cost + NORMS[config.norm.type].cost(config)


def _in_words(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
