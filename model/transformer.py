"""The decoder. B batch, T sequence, D d_model, V vocabulary."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.cache import KeyValueCache
from model.config import LossConfig, ModelConfig, MoEConfig, known
from model.cost import Cost, linear_cost
from model.loss import CROSS_ENTROPY, IGNORE_INDEX, mean_loss, token_loss_sum
from model.masks import make_mask
from model.moe import MoE, add_gradient_of, auxiliary_sum
from model.norms import NORMS
from model.positions import POSITIONS, places_in_documents
from model.router import Routing
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
        self.blocks = nn.ModuleList(
            Block(config, moe=layer in config.moe_layers) for layer in range(config.num_layers)
        )
        self.norm = None if config.norm.placement == "post" else NORMS[config.norm.type](config)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        loss_func: Callable[[Tensor, Tensor], Tensor] | None = None,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only, in the weights' dtype.

        With targets (B, T) int64: (logits, loss), the mean over targets that are not IGNORE_INDEX, or what
        loss_func(logits (B * T, V), targets (B * T,)) returns, such as F.cross_entropy.
        document_ids (B, T) int64: tokens see their own document, a run of one id, and positions restart in it.
        padding (B, T) bool: tokens that no token sees, True where padded; positions count the others.
        With a cache: tokens go on from those that the cache holds.
        Raises ValueError past the learned positions, for document_ids with a cache, and where the attention
        kernel asked for can't do it.
        """
        hidden, routings = self._hidden(tokens, cache, document_ids, padding)
        logits = F.linear(hidden[:, -1:] if last_only else hidden, self._head_weight())
        if targets is None:
            return logits
        if loss_func is None:
            loss = mean_loss(logits.flatten(0, 1), targets.flatten(), self._loss_config())
        else:
            loss = loss_func(logits.flatten(0, 1), targets.flatten(0, 1))
        if routings:
            scored = (targets != IGNORE_INDEX).sum(dim=1)
            loss = add_gradient_of(loss, auxiliary_sum(routings, scored) / scored.sum())
        return logits, loss

    def loss_sum(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Sum of the token losses over targets (B, T) that are not IGNORE_INDEX, for tokens (B, T).

        A scalar in fp32 (fp64 for fp64 weights). Never holds more logits than a chunk's. In training,
        z-loss and label smoothing of config.loss are in it; of the experts' auxiliary losses only the
        gradient is, each sequence's times its number of scored targets. document_ids and padding as in forward.
        """
        hidden, routings = self._hidden(tokens, None, document_ids, padding)
        loss = token_loss_sum(
            hidden.flatten(0, 1), self._head_weight(), targets.flatten(), self._loss_config()
        )
        if not routings:
            return loss
        return add_gradient_of(loss, auxiliary_sum(routings, (targets != IGNORE_INDEX).sum(dim=1)))

    def _loss_config(self) -> LossConfig:
        return self.config.loss if self.training else CROSS_ENTROPY

    def _hidden(
        self, tokens: Tensor, cache: KeyValueCache | None, document_ids: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        """(B, T) -> (B, T, D), ready for the head, and the routing of each layer with experts."""
        routings: list[Routing] = []
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
            if isinstance(x, tuple):
                x, routing = x
                routings.append(routing)
                if self.training and torch.is_grad_enabled():
                    cast(MoE, block.feedforward).record(routing)
        return (x if self.norm is None else self.norm(x)), routings

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def weights(self) -> dict[str, Weight]:
        weights = {"embedding.weight": Weight("vocabulary", "embedding")}
        if self.head is not None:
            weights["head.weight"] = Weight("vocabulary", "normal")
        return weights

    @staticmethod
    def cost(config: ModelConfig, seq_len: int) -> Cost:
        table = known(config.vocab_size) * config.d_model
        head = linear_cost(config.d_model, known(config.vocab_size))
        cost = Cost(parameters=table, embedding=table) + POSITIONS[config.positional.encoding].cost(config)
        with_experts = len(config.moe_layers)
        cost += Block.cost(config, seq_len) * (config.num_layers - with_experts)
        if with_experts:
            cost += Block.cost(config, seq_len, moe=True) * with_experts
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
        counts = f"{_in_words(cost.parameters)} parameters, "
        if config.moe is not None:
            counts += f"{_in_words(cost.parameters - cost.idle)} active, "
            parts.insert(3, _describe(config.moe, len(config.moe_layers), config.num_layers))
        counts += f"{_in_words(cost.parameters - cost.embedding)} non-embedding"
        return f"Transformer({counts}; {', '.join(parts)})\n{super().__repr__()}"


def _describe(moe: MoEConfig, layers: int, num_layers: int) -> str:
    shared = f" + {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    where = "" if layers == num_layers else f" in {layers} of {num_layers} layers"
    return f"top {moe.top_k} of {moe.num_experts} experts{shared} d_ff {moe.d_ff}{where}"


def _in_words(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
