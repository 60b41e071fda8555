"""Ring attention (Liu et al. 2023): queries stay where they are, and keys and values go from rank to rank.

Each rank has two runs of every sequence (`parallel.zigzag`). While it computes with the keys and values that it holds,
the next are on their way to it; the backward sends them round again, and their gradients after them. B batch, T
sequence, n ranks, H heads, K kv heads, Q width of queries and keys, E of values.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from model.attention_config import AttentionConfig
from model.kernels import Mask
from parallel.ring_blocks import Attended, Merged, Scoring, attend_block, block_gradients, blocks
from parallel.zigzag import runs_of


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    attention: str,
    dropout: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """query (B, T / n, H, Q), key (B, T / n, K, Q), value (B, T / n, K, E), of this rank's runs -> (B, T / n, H, E).

    attention: the configuration's section, in JSON. dropout: of the probabilities, 0 but in training.
    """
    parts = (part.transpose(1, 2) for part in (query, key, value))
    seed = torch.randint(2**62, (), device="cpu") if dropout else None
    told = mask.bias, mask.documents, mask.padding, seed, attention, dropout, group.group_name
    return attend_in_ring(*parts, *told)[0].transpose(1, 2)


class _Message:
    """Tensors on their way to the next rank, and as many from the one before."""

    def __init__(self, tensors: list[Tensor], group: dist.ProcessGroup) -> None:
        self._sent = [tensor.contiguous() for tensor in tensors]  # held until they are there
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        after, before = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
        send = functools.partial(dist.P2POp, dist.isend, group=group, group_peer=after)
        receive = functools.partial(dist.P2POp, dist.irecv, group=group, group_peer=before)
        self._works = dist.batch_isend_irecv([*map(send, self._sent), *map(receive, self._received)])

    def arrived(self) -> list[Tensor]:
        """What came."""
        for work in self._works:
            work.wait()
        return self._received


class _Round:
    """One way round the ring."""

    def __init__(self, query: Tensor, told: tuple[Any, ...]) -> None:
        bias, documents, padding, seed, attention, dropout, group_name = told
        self.group = _resolve_process_group(group_name)
        self.ranks = self.group.size()
        length = query.shape[2] * self.ranks
        self.scoring = Scoring(_section(attention), length, bias, documents, padding, dropout, seed)

    def runs(self, behind: int) -> tuple[range, ...]:
        """The places of the rank that is so many behind."""
        return runs_of(self.scoring.length, (self.group.rank() - behind) % self.ranks, self.ranks)

    def blocks(self, behind: int) -> Any:
        """Those of this rank's queries with the keys of the rank that is so many behind."""
        return blocks(self.scoring.config, self.runs(0), self.runs(behind))


@functools.cache
def _section(attention: str) -> AttentionConfig:
    return AttentionConfig.model_validate_json(attention)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    attention: str,
    dropout: float,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """query (B, H, T / n, Q), key (B, K, T / n, Q), value (B, K, T / n, E) -> (B, H, T / n, E), log-sums (B, H, T / n).

    The rest as in `parallel.ring_blocks.Scoring`.
    """
    way = _Round(query, (bias, documents, padding, seed, attention, dropout, group_name))
    merged, held = Merged(query, value.shape[-1]), [key, value]
    for step in range(way.ranks):
        message = _Message(held, way.group) if step < way.ranks - 1 else None
        for block in way.blocks(step):
            mine, theirs = block.of_queries, block.of_keys
            inputs = query[:, :, mine], held[0][:, :, theirs], held[1][:, :, theirs]
            merged.add(mine, *attend_block(*inputs, block, way.scoring))
        if message is not None:
            held = message.arrived()
    return merged.out.to(query.dtype), merged.log_sums


def backward(
    grad: Tensor,
    out: Tensor,
    log_sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    attention: str,
    dropout: float,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and, empty where there is none, bias.

    Those of keys and values follow these from rank to rank, summed on their way in at least fp32, until they are home.
    """
    way = _Round(query, (bias, documents, padding, seed, attention, dropout, group_name))
    wide = log_sums.dtype
    attended, held = Attended(out, log_sums, grad), [key, value]
    of_query = torch.zeros_like(query, dtype=wide, memory_format=torch.contiguous_format)
    of_bias = query.new_zeros(0 if bias is None else bias.shape, dtype=wide)
    own: list[Tensor] = []
    following: _Message | None = None
    for step in range(way.ranks):
        message = _Message(held, way.group) if step < way.ranks - 1 else None
        of_held = [torch.zeros_like(part, dtype=wide, memory_format=torch.contiguous_format) for part in held]
        for block in way.blocks(step):
            mine, theirs = block.of_queries, block.of_keys
            inputs = query[:, :, mine], held[0][:, :, theirs], held[1][:, :, theirs]
            found = block_gradients(*inputs, attended.of(mine), block, way.scoring)
            of_query[:, :, mine] += found.query
            for total, part in zip(of_held, (found.key, found.value), strict=True):
                total[:, :, theirs] += part
            if found.bias is not None:
                of_bias[:, way.scoring.distances(block)] += found.bias
        if step == 0:
            own = of_held
        else:
            following = _Message(_sums(of_held, following), way.group)
        if message is not None:
            held = message.arrived()
    of_key, of_value = _sums(own, following)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_bias


def _sums(parts: list[Tensor], arriving: _Message | None) -> list[Tensor]:
    if arriving is None:
        return parts
    return [part + other for part, other in zip(parts, arriving.arrived(), strict=True)]


attend_in_ring = torch.library.custom_op("trireme::ring_attention", forward, mutates_args=())
_attend_in_ring_backward = torch.library.custom_op(
    "trireme::ring_attention_backward", backward, mutates_args=()
)

OPERATORS: dict[Any, Callable[..., Any]] = {
    torch.ops.trireme.ring_attention.default: forward,
    torch.ops.trireme.ring_attention_backward.default: backward,
}
"""Operators that the compiler, and what keeps activations, does not look into, and what they are made of."""


@attend_in_ring.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *told: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    return out, query.new_empty(query.shape[:-1], dtype=wide)


@_attend_in_ring_backward.register_fake
def _(
    grad: Tensor, out: Tensor, log_sums: Tensor, query: Tensor, key: Tensor, value: Tensor, *told: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = told[0]
    parts = (part.new_empty(part.shape) for part in (query, key, value))
    return *parts, query.new_empty(0 if bias is None else bias.shape, dtype=log_sums.dtype)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, documents, padding, seed, *ctx.told = inputs
    ctx.save_for_backward(*output, query, key, value, bias, documents, padding, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    out, log_sums, *inputs = ctx.saved_tensors  # to be asked for once, where they are recomputed
    has_bias = inputs[3] is not None
    *of_parts, of_bias = _attend_in_ring_backward(grad, out, log_sums, *inputs, *ctx.told)
    told = None, None, None, None, None, None  # documents, padding, seed, attention, dropout, group
    return *of_parts, of_bias.to(grad.dtype) if has_bias else None, *told


attend_in_ring.register_autograd(_backward, setup_context=_save)
