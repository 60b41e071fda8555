"""Tensor parallelism (Shoeybi et al. 2019) by what the components declare of their weights.

A component that declares cut weights is a region: what enters it is the same on all ranks, each computes with its
share of heads or features, and what its row-cut projections make is summed. With sequence parallelism (Korthikanti et
al. 2022) the ranks hold different tokens between regions. B batch, T sequence, D d_model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig, known
from model.model import Model
from model.moe import MoE
from model.transformer import Trunk
from model.weights import Declares
from parallel.collectives import add, add_and_split, copy, gather, join, split
from parallel.cut import DIM, Cut, Declared, declarations, keep_share
from parallel.draws import OwnDraws
from parallel.fp8 import product
from parallel.router import route_whole_sequences
from parallel.vocabulary import SharedVocabulary


class Tokens:
    """How a tensor-parallel group shares out the tokens of the sequences that it is at."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._length = 0

    def split(self, x: Tensor) -> Tensor:
        """(B, T, ...), the same on all ranks -> this rank's tokens."""
        self._length = x.shape[1]
        return split(x, self.group)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return join(x, self._length, self.group)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens, each rank going on with its own heads or features of them."""
        return gather(x, self._length, self.group)

    def add_and_split(self, x: Tensor) -> Tensor:
        """This rank's tokens of the sum of what the ranks' heads or features made."""
        return add_and_split(x, self.group)


def share_out(model: Model, group: dist.ProcessGroup, *, sequence_parallel: bool) -> dict[str, Cut]:
    """Leave each rank its share of every weight, on the meta device, and make the regions' collectives.

    Experts stay whole: each rank gives them its share of the tokens.
    Returns how every parameter is cut.
    """
    if group.size() == 1:
        return {d.name: Cut(d.shape, expert=d.weight.sharding == "experts") for d in declarations(model)}
    share_tokens: set[int] = set()
    for stack in model.stacks:
        tokens = Tokens(group)
        if sequence_parallel:
            share_tokens |= {id(module) for module in _inside(stack)}
            _share_tokens(stack[0], stack[-1], tokens, draws=_draws(model))
        for module in _inside(stack):
            if isinstance(module, MoE):
                route_whole_sequences(module.router, tokens)
                if not sequence_parallel:
                    share_tokens |= {id(inner) for inner in module.modules()}
                    _share_tokens(module, module, tokens, draws=_draws(model))
        for module in _inside(stack):
            if _is_region(module):
                _make_region(module, group, tokens if id(module) in share_tokens else None)
    cuts = {
        declared.name: _cut(declared, model, group, partial=id(declared.owner) in share_tokens)
        for declared in declarations(model)
    }
    if isinstance(model, Trunk):
        model.vocabulary = SharedVocabulary(known(model.config.vocab_size), group)
    return cuts


def _inside(stack: list[nn.Module]) -> Iterator[nn.Module]:
    for block in stack:
        yield from block.modules()


def _is_region(module: nn.Module) -> bool:
    return isinstance(module, Declares) and any(
        weight.sharding in ("row", "heads_in") for weight in module.weights().values()
    )


def _cut(declared: Declared, model: Model, group: dist.ProcessGroup, *, partial: bool) -> Cut:
    """Cut one parameter. partial: its gradient is of this rank's tokens alone where the parameter is whole."""
    _, owner, attribute, weight = declared
    shape = declared.shape
    if weight.sharding == "experts":
        return Cut(shape, expert=True, partial=True)
    if weight.sharding == "kv_heads" and _kv_heads(model) % group.size():
        # fewer heads than ranks: each has them all, and computes the one that its queries look at
        assert isinstance(owner, nn.Linear)
        _replace_forward(owner, _some_rows(owner, *_rows_of_own_head(shape[0], _kv_heads(model), group)))
        return Cut(shape, partial=True)
    dim = DIM.get(weight.sharding)
    if dim is None:
        return Cut(shape, partial=partial or weight.sharding == "every_head")
    keep_share(owner, attribute, dim, group.rank(), group.size())
    return Cut(shape, dim)


def _replace_forward(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> None:
    linear.forward = forward  # type: ignore[method-assign,assignment]


def _kv_heads(model: Model) -> int:
    assert isinstance(model.config, ModelConfig)
    return known(model.config.attention.num_kv_heads)


def _rows_of_own_head(rows: int, kv_heads: int, group: dist.ProcessGroup) -> tuple[int, int]:
    width, head = rows // kv_heads, group.rank() * kv_heads // group.size()
    return head * width, (head + 1) * width


def _some_rows(linear: nn.Linear, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias[start:stop]
        return product(linear, x, linear.weight[start:stop], bias)

    return forward


def _make_region(module: nn.Module, group: dist.ProcessGroup, tokens: Tokens | None) -> None:
    """Make activations (B, T, D), and what an encoder made, come in and go out rightly."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        x = copy(x, group) if tokens is None else tokens.gather(x)
        return x, *(copy(o, group) if _is_activation(o) else o for o in others)

    def leave(x: Tensor) -> Tensor:
        return add(x, group) if tokens is None else tokens.add_and_split(x)

    module.register_forward_pre_hook(enter)
    if tokens is None and getattr(module, "dropout", None):
        OwnDraws(group).between(module, module)
    assert isinstance(module, Declares)
    for name, weight in module.weights().items():
        path, _, attribute = name.rpartition(".")
        if weight.sharding in ("row", "heads_in") and attribute == "weight":
            linear = module.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            _replace_forward(linear, _summed(linear, leave))


def _is_activation(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _summed(linear: nn.Linear, leave: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A projection of this rank's features, whose bias is added once, to the sum."""

    def forward(x: Tensor) -> Tensor:
        output = leave(product(linear, x, linear.weight))
        return output if linear.bias is None else output + linear.bias

    return forward


def _draws(model: Model) -> bool:
    config = model.config
    assert isinstance(config, ModelConfig)
    return max(config.dropout, config.attention.dropout, config.ffn.dropout) > 0


def _share_tokens(first: nn.Module, last: nn.Module, tokens: Tokens, *, draws: bool) -> None:
    """Between the entrance of `first` and the exit of `last` each rank works on its share of the tokens."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        return tokens.split(x), *others

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            x, *others = output
            return tokens.join(x), *others
        return tokens.join(output)

    if draws:
        OwnDraws(tokens.group).between(first, last)
    first.register_forward_pre_hook(enter)
    last.register_forward_hook(leave)
