"""The decoder. B batch, T sequence, D d_model, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.cache import KeyValueCache
from model.config import ModelConfig, known
from model.cost import Cost, linear_cost
from model.loss import IGNORE_INDEX, token_loss_sum
from model.masks import make_mask
from model.norms import NORMS
from model.positions import POSITIONS, places_in_documents
from model.weights import Weight


class Transformer(nn.Module):
    """Embedding, blocks, norm, head. A tied head is the embedding's weight, without a module.

    With norm placement post there is no last norm, since every block ends in one.
    Weights are torch's defaults until `model.initialize.initialize` fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only, in the weights' dtype.

        With targets (B, T) int64: (logits, loss), the mean over targets that are not IGNORE_INDEX.
        document_ids (B, T) int64: tokens see their own document, a run of one id, and positions restart in it.
        padding (B, T) bool: tokens that no token sees, True where padded; positions count the others.
        With a cache: tokens go on from those that the cache holds.
        Raises ValueError past the learned positions, for document_ids with a cache, and where the attention
        kernel asked for can't do it.
        """
        hidden = self._hidden(tokens, cache, document_ids, padding)
        logits = F.linear(hidden[:, -1:] if last_only else hidden, self._head_weight())
        if targets is None:
            return logits
        flat = logits.flatten(0, 1)
        if flat.dtype.itemsize < 4:
            flat = flat.float()
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX)

    def loss_sum(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Sum of the token losses over targets (B, T) that are not IGNORE_INDEX, for tokens (B, T).

        A scalar in fp32 (fp64 for fp64 weights). Never holds more logits than a chunk's. document_ids and
        padding as in forward.
        """
        hidden = self._hidden(tokens, None, document_ids, padding)
        return token_loss_sum(hidden.flatten(0, 1), self._head_weight(), targets.flatten())

    def _hidden(
        self, tokens: Tensor, cache: KeyValueCache | None, document_ids: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """(B, T) -> (B, T, D), ready for the head."""
        offset, length = 0 if cache is None else cache.length, tokens.shape[1]
        queries = keys = range(offset, offset + length)
        if cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids can't go with a cache, which holds one document in each row")
            keys, padding = cache.keys(length), cache.add_padding(padding, tokens)
        places = places_in_documents(length, offset, document_ids, padding)
        x = self.positions.embed(self.embedding(tokens), offset, places)
        x = F.dropout(x, self.config.dropout, self.training)
        rotation = self.positions.rotation(x, offset)
        mask = make_mask(
            self.config.attention,
            queries,
            keys,
            x,
            bias=self.positions.bias(x),
            heads=self.positions.heads,
            documents=document_ids,
            padding=padding,
            cached=cache is not None,
        )
        for index, block in enumerate(self.blocks):
            x = block(x, mask, rotation, None if cache is None else cache.layers[index])
        return x if self.norm is None else self.norm(x)

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def weights(self) -> dict[str, Weight]:
        weights = {"embedding.weight": Weight("vocabulary", "normal")}
        if self.head is not None:
            weights["head.weight"] = Weight("vocabulary", "normal")
        return weights

    @staticmethod
    def cost(config: ModelConfig, seq_len: int) -> Cost:
        table = known(config.vocab_size) * config.d_model
        head = linear_cost(config.d_model, known(config.vocab_size))
        cost = Cost(parameters=table, embedding=table) + POSITIONS[config.positional.encoding].cost(config)
        cost += Block.cost(config, seq_len) * config.num_layers
        cost += Cost(flops=head.flops) if config.tie_embeddings else head
        return cost if config.norm.placement == "post" else cost + NORMS[config.norm.type].cost(config)

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
        return f"Transformer({total} parameters, {rest} non-embedding; {settings})\n{super().__repr__()}"


def _in_words(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
