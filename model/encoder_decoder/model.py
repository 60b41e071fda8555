"""An encoder and a decoder (Vaswani et al. 2017; T5, Raffel et al. 2020).

B batch, S tokens of the source, T of the target, D d_model, V vocabulary.
"""

import torch
from torch import Tensor, nn

from model.cache import KeyValueCache
from model.cost import Cost
from model.cross_attention import Memory, MemoryCache
from model.encoder_decoder.config import EncoderDecoderConfig
from model.transformer import Hidden, LossFunction, Stack, Trunk, stack_cost, trunk_cost


class Encoder(Stack):
    """Blocks that see the whole source."""

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Hidden:
        """Embeddings (B, S, D), padding (B, S) bool -> (B, S, D), and the routing of layers with experts."""
        return self._run(embeddings, padding=padding)


class EncoderDecoder(Trunk):
    """The decoder, and an encoder with the same embedding."""

    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.encoder)

    @property
    def stacks(self) -> list[list[nn.Module]]:
        """The blocks of each."""
        return [list(self.encoder.blocks), list(self.blocks)]

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        source_padding: Tensor | None = None,
        padding: Tensor | None = None,
        loss_func: LossFunction | None = None,
        cache: "DecoderCache | None" = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """source (B, S), tokens (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only.

        source_padding (B, S) and padding (B, T), bool: what no token sees, True where padded. targets, loss_func:
        as for a decoder. With a cache: tokens go on from those that it holds, and the source is read once.
        Raises ValueError past the learned positions.
        """
        hidden = self._decode(source, tokens, source_padding, padding, cache)
        return self._logits(hidden, targets, loss_func=loss_func, last_only=last_only)

    def loss_sum(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor,
        *,
        source_padding: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Sum of the losses over targets (B, T) that are not IGNORE_INDEX; see Transformer.loss_sum."""
        return self._loss_sum(self._decode(source, tokens, source_padding, padding), targets)

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        source = torch.zeros(batch, self.config.memory_len, dtype=torch.int64)
        return super().example(batch, length) | {"source": source, "source_padding": source.bool()}

    def make_cache(self, capacity: int) -> "DecoderCache":
        """For generating: room for so many tokens of the target in each row."""
        return DecoderCache(self.config, capacity)

    def _decode(
        self,
        source: Tensor,
        tokens: Tensor,
        source_padding: Tensor | None,
        padding: Tensor | None,
        cache: "DecoderCache | None" = None,
    ) -> Hidden:
        if cache is None or cache.memory is None:
            encoded, routings = self.encoder(self.embed(source), source_padding)
            memory = Memory(encoded, source_padding)
        else:
            memory, routings = cache.memory, []
        if cache is None:
            memories = [memory] * len(self.blocks)
        else:
            cache.memory = memory
            memories = [memory._replace(cache=keys) for keys in cache.memory_keys]
        hidden = self._run(self.embed(tokens), cache, padding=padding, memories=memories)
        return Hidden(hidden.states, routings + hidden.routings)

    @staticmethod
    def cost(config: EncoderDecoderConfig, seq_len: int) -> Cost:
        """For one token of the target, its share of a source of max_source_len tokens included."""
        encoder = stack_cost(config.encoder, config.memory_len)
        flops = encoder.flops * config.memory_len / seq_len
        share = Cost(encoder.parameters, encoder.embedding, encoder.idle, flops)
        return trunk_cost(config, seq_len) + share


class DecoderCache(KeyValueCache):
    """What the decoder keeps of its own tokens, and of the source."""

    def __init__(self, config: EncoderDecoderConfig, capacity: int) -> None:
        super().__init__(config, capacity)
        self.memory: Memory | None = None
        self.memory_keys = [MemoryCache() for _ in range(config.num_layers)]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows of the batch (N,) int64, in this order, of which some may come more than once."""
        super().reorder(rows)
        for keys in self.memory_keys:
            keys.reorder(rows)
        if self.memory is not None:
            states, padding, _ = self.memory
            self.memory = Memory(states[rows], None if padding is None else padding[rows])
