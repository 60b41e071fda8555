"""The decoder, and what all transformers share. B batch, T sequence, D d_model, V vocabulary."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.cache import KeyValueCache
from model.config import LossConfig, ModelConfig, MoEConfig, known
from model.cost import Cost, linear_cost
from model.cross_attention import Memory
from model.kernels import Mask
from model.loss import CROSS_ENTROPY, IGNORE_INDEX, mean_loss
from model.masks import make_mask
from model.model import Model
from model.moe import MoE, add_gradient_of, auxiliary_sum
from model.norms import NORMS
from model.part import Part, Runs, joined, pieces
from model.positions import POSITIONS, places_in_documents
from model.rope import Rotation
from model.router import Routing
from model.vocabulary import Vocabulary
from model.weights import Weight

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Hidden(NamedTuple):
    """What the head takes, (B, T, D), and the routing of each layer with experts."""

    states: Tensor
    routings: list[Routing]


class Stack(nn.Module):
    """Positions, blocks, norm: from embeddings to what a head or a decoder takes.

    With norm placement post there is no last norm, since every block ends in one.
    """

    config: ModelConfig
    blocks: nn.ModuleList
    mask: Callable[..., Mask] = staticmethod(make_mask)
    """What the blocks are told of which tokens see which, made as `make_mask` does."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.positions = POSITIONS[config.positional.encoding](config)
        self.blocks = nn.ModuleList(
            Block(config, moe=layer in config.moe_layers) for layer in range(config.num_layers)
        )
        self.embedding_norm = NORMS[config.norm.type](config) if config.norm.embedding else None
        self.norm = None if config.norm.placement == "post" else NORMS[config.norm.type](config)

    def _run(
        self,
        embeddings: Tensor,
        cache: KeyValueCache | None = None,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        part: Part | None = None,
        prefix: Tensor | None = None,
        memories: Sequence[Memory] | None = None,
    ) -> Hidden:
        """Embeddings (B, T, D) -> what the head takes, (B, T, D), and the routing of each layer with experts.

        part: the places of these tokens in a longer sequence, for all of which document_ids and padding are.
        prefix (B, P, D): what is put before the first token, without a position of its own in the embeddings,
        and left out again at the end.
        memories: what each block's cross-attention looks at.
        """
        if cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids can't go with a cache, which holds one document in each row")
            padding = cache.add_padding(padding, embeddings[..., 0])
        runs = _runs(embeddings.shape[1], part, cache)
        x = self._enter(embeddings, runs, document_ids, padding, prefix)
        hidden = self._through_blocks(x, cache, document_ids, padding, part, memories)
        return self._leave(hidden, 0 if prefix is None else prefix.shape[1])

    def _enter(
        self,
        embeddings: Tensor,
        runs: Runs | None = None,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, T, D) of tokens at the places of runs, else of all -> what enters the first block."""
        runs = runs or _runs(embeddings.shape[1])
        placed = []
        for run, piece in zip(runs, pieces(embeddings, runs), strict=True):
            places = places_in_documents(len(run), run.start, document_ids, padding)
            placed.append(self.positions.embed(piece, run.start, places))
        x = joined(placed, dim=1)
        if prefix is not None:
            x = torch.cat((prefix, x), dim=1)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return F.dropout(x, self.config.dropout, self.training)

    def _leave(self, hidden: Hidden, prefix_length: int = 0) -> Hidden:
        """What leaves the last block -> what the head takes."""
        x = hidden.states[:, prefix_length:] if prefix_length else hidden.states
        return Hidden(x if self.norm is None else self.norm(x), hidden.routings)

    def _through_blocks(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        part: Part | None = None,
        memories: Sequence[Memory] | None = None,
    ) -> Hidden:
        """What enters the first block, (B, T, D) -> what leaves the last."""
        routings: list[Routing] = []
        runs = _runs(x.shape[1], part, cache)
        rotation = self._rotation(x, runs)
        queries = runs[0] if part is None else range(part.length)
        mask = self.mask(
            self.config.attention,
            queries,
            queries if cache is None else cache.keys(x.shape[1]),
            x,
            bias=self.positions.bias(x),
            heads=self.positions.heads if part is None else self.positions.part_heads,
            documents=document_ids,
            padding=padding,
            cached=cache is not None,
        )
        mask = mask._replace(padding=padding)
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            x = block(x, mask, rotation, layer_cache, None if memories is None else memories[index])
            if isinstance(x, tuple):
                x, routing = x
                routings.append(routing)
                if self.training and torch.is_grad_enabled():
                    cast(MoE, block.feedforward).record(routing)
        return Hidden(x, routings)

    def _rotation(self, x: Tensor, runs: Runs) -> Rotation | None:
        """How queries and keys of tokens (B, T, D) at the places of runs turn."""
        made = [
            self.positions.rotation(piece, run.start)
            for run, piece in zip(runs, pieces(x, runs), strict=True)
        ]
        turning = [rotation for rotation in made if rotation is not None]
        if not turning:
            return None
        cos, sin = zip(*turning, strict=True)
        return joined(cos, dim=0), joined(sin, dim=0)


def _runs(length: int, part: Part | None = None, cache: KeyValueCache | None = None) -> Runs:
    """The places of so many tokens."""
    if part is not None:
        return part.runs
    first = 0 if cache is None else cache.length
    return (range(first, first + length),)


class Trunk(Stack, Model):
    """Embedding, blocks, norm, head. A tied head is the embedding's weight, without a module.

    The sum of losses is made in three steps, of which a process may take some: start, middle, finish.
    Weights are torch's defaults until `model.initialize.initialize` fills them.
    """

    config: ModelConfig
    prefix_length: ClassVar[int] = 0
    """Places before the first token's that `start` adds and `finish` leaves out."""
    entrance: ClassVar[tuple[str, ...]] = ("embedding", "embedding_norm")
    """The modules that `start` alone needs, and `finish` where the head is tied to the embedding."""
    start: Callable[..., Tensor]
    """start(what loss_sum takes beside the targets) -> what enters the first block, (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is unset: give the tokenizer's size, 32000 for example")
        self.vocabulary = Vocabulary()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )

    def middle(
        self,
        x: Tensor,
        *,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        part: Part | None = None,
    ) -> Hidden:
        """What enters the first block, (B, T, D) -> what leaves the last."""
        return self._through_blocks(x, None, document_ids, padding, part)

    def finish(self, hidden: Hidden, targets: Tensor, part: Part | None = None) -> Tensor:
        """What leaves the last block -> the sum of the losses, (); see loss_sum."""
        return self._loss_sum(self._leave(hidden, self.prefix_length), targets, part)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64, or distributions over the vocabulary (B, T, V) -> (B, T, D)."""
        return self.vocabulary.embed(tokens, self.embedding.weight)

    def make_cache(self, capacity: int) -> KeyValueCache:
        """For generating: room for so many tokens in each row."""
        return KeyValueCache(self.config, capacity)

    def _logits(
        self,
        hidden: Hidden,
        targets: Tensor | None,
        *,
        loss_func: LossFunction | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V), or (B, 1, V) with last_only; with targets (B, T) also the mean loss.

        loss_func(logits (B * T, V), targets (B * T, ...)) may say what the loss is, of targets of other kinds too.
        """
        states, routings = self._scaled(hidden)
        logits = self.vocabulary.logits(states[:, -1:] if last_only else states, self._head_weight())
        if targets is None:
            return logits
        if loss_func is None:
            loss = mean_loss(logits.flatten(0, 1), targets.flatten(), self._loss_config())
        else:
            loss = loss_func(logits.flatten(0, 1), targets.flatten(0, 1))
        if routings:
            tokens = targets if targets.dim() == 2 else targets[..., 0]
            scored = (tokens != IGNORE_INDEX).sum(dim=1)
            loss = add_gradient_of(loss, auxiliary_sum(routings, scored) / scored.sum())
        return logits, loss

    def _loss_sum(self, hidden: Hidden, targets: Tensor, part: Part | None = None) -> Tensor:
        """The sum of the losses over targets (B, T), or a part, without the logits of all tokens at once."""
        states, routings = self._scaled(hidden)
        here = targets if part is None else part.of(targets)
        loss = self.vocabulary.loss_sum(
            states.flatten(0, 1), self._head_weight(), here.flatten(), self._loss_config()
        )
        if not routings:
            return loss
        return add_gradient_of(loss, auxiliary_sum(routings, (targets != IGNORE_INDEX).sum(dim=1)))

    def _scaled(self, hidden: Hidden) -> Hidden:
        scale = self.config.readout_scale
        return hidden if scale == 1.0 else hidden._replace(states=hidden.states * scale)

    def _loss_config(self) -> LossConfig:
        return self.config.loss if self.training else CROSS_ENTROPY

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def weights(self) -> dict[str, Weight]:
        weights = {}
        if isinstance(self.embedding, nn.Embedding):
            weights["embedding.weight"] = Weight("vocabulary", "embedding")
        if isinstance(self.head, nn.Linear):
            weights["head.weight"] = Weight("vocabulary", "normal", wide="in")
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
        counts = f"{_in_words(cost.parameters)} parameters, "
        if config.moe is not None:
            counts += f"{_in_words(cost.parameters - cost.idle)} active, "
            parts.insert(3, _describe(config.moe, len(config.moe_layers), config.num_layers))
        counts += f"{_in_words(cost.parameters - cost.embedding)} non-embedding"
        return f"{type(self).__name__}({counts}; {', '.join(parts)})\n{super().__repr__()}"


class Transformer(Trunk):
    """The decoder: from tokens to the logits of the next ones."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        loss_func: LossFunction | None = None,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only, in the weights' dtype.

        For tokens also distributions over the vocabulary, (B, T, V).
        With targets (B, T) int64: (logits, loss), the mean over targets that are not IGNORE_INDEX, or what
        loss_func(logits (B * T, V), targets (B * T,)) returns, such as F.cross_entropy.
        document_ids (B, T) int64: tokens see their own document, a run of one id, and positions restart in it.
        padding (B, T) bool: tokens that no token sees, True where padded; positions count the others.
        With a cache: tokens go on from those that the cache holds.
        Raises ValueError past the learned positions, for document_ids with a cache, and where the attention
        kernel asked for can't do it.
        """
        hidden = self._run(self.embed(tokens), cache, document_ids, padding)
        return self._logits(hidden, targets, loss_func=loss_func, last_only=last_only)

    def loss_sum(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Sum of the token losses over targets (B, T) that are not IGNORE_INDEX, for tokens (B, T).

        A scalar in fp32 (fp64 for fp64 weights). Never holds more logits than a chunk's. In training,
        z-loss and label smoothing of config.loss are in it; of the experts' auxiliary losses only the
        gradient is, each sequence's times its number of scored targets. document_ids and padding as in forward.
        part: the sum over this part of the sequences alone.
        """
        x = self.start(tokens, targets, document_ids=document_ids, padding=padding, part=part)
        hidden = self.middle(x, document_ids=document_ids, padding=padding, part=part)
        return self.finish(hidden, targets, part)

    def start(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """What of loss_sum comes before the blocks, which are not told the targets."""
        embeddings = self.embed(tokens if part is None else part.of(tokens))
        return self._enter(embeddings, None if part is None else part.runs, document_ids, padding)

    @staticmethod
    def cost(config: ModelConfig, seq_len: int) -> Cost:
        return trunk_cost(config, seq_len)


def stack_cost(config: ModelConfig, seq_len: int) -> Cost:
    """Of positions, blocks and norms."""
    with_experts = len(config.moe_layers)
    cost = POSITIONS[config.positional.encoding].cost(config)
    cost += Block.cost(config, seq_len) * (config.num_layers - with_experts)
    if with_experts:
        cost += Block.cost(config, seq_len, moe=True) * with_experts
    norms = config.norm.embedding + (config.norm.placement != "post")
    return cost + NORMS[config.norm.type].cost(config) * norms


def trunk_cost(config: ModelConfig, seq_len: int) -> Cost:
    """Of what all transformers share."""
    table = known(config.vocab_size) * config.d_model
    head = linear_cost(config.d_model, known(config.vocab_size))
    cost = Cost(parameters=table, embedding=table) + stack_cost(config, seq_len)
    return cost + (Cost(flops=head.flops) if config.tie_embeddings else head)


def _describe(moe: MoEConfig, layers: int, num_layers: int) -> str:
    shared = f" + {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    where = "" if layers == num_layers else f" in {layers} of {num_layers} layers"
    return f"top {moe.top_k} of {moe.num_experts} experts{shared} d_ff {moe.d_ff}{where}"


def _in_words(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
