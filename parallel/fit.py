"""Whether a model and its sequences can be laid out so. Light to import: it is checked before anything starts."""

from collections.abc import Callable

from model.config import BaseModelConfig, ModelConfig, known
from parallel.errors import LayoutError
from parallel.layout import Layout

SPLITS_SEQUENCES = ("transformer", "image_codes")
"""Models that can work on a part of a sequence."""


def check_fit(layout: Layout, model: BaseModelConfig, seq_len: int) -> None:
    """Raises LayoutError, with the nearest size that works, where the model can't be laid out so."""
    if not isinstance(model, ModelConfig):
        _refuse_all_but_data(layout, model)
        return
    if layout.pp > 1:
        raise LayoutError(f"parallel.pp={layout.pp}: pipelines aren't built: use parallel.pp=1 and parallel.tp")
    if layout.tp > 1:
        _check_tensor(layout.tp, model)
    if layout.cp > 1:
        _check_context(layout, model, seq_len)
    if layout.ep > 1:
        _check_experts(layout.ep, model)


def _refuse_all_but_data(layout: Layout, model: BaseModelConfig) -> None:
    for name in ("pp", "cp", "tp", "ep"):
        if getattr(layout, name) > 1:
            raise LayoutError(
                f"parallel.{name}={getattr(layout, name)}: a model of type {model.type} is no transformer, and is "
                f"laid out over data-parallel ranks only: use parallel.{name}=1 and more of parallel.dp_shard"
            )


def _check_tensor(tp: int, model: ModelConfig) -> None:
    heads, kv_heads = model.attention.num_heads, known(model.attention.num_kv_heads)

    def heads_fit(ranks: int) -> bool:
        return heads % ranks == 0 and _shares(kv_heads, ranks)

    if not heads_fit(tp):
        raise LayoutError(
            f"parallel.tp={tp} can't share out model.attention.num_heads={heads} and num_kv_heads={kv_heads}, of "
            f"which each rank takes as many, or several ranks one kv head: use parallel.tp={_nearest(tp, heads_fit)}"
        )
    widths = {"model.vocab_size": known(model.vocab_size), "model.ffn.d_ff": known(model.ffn.d_ff)}
    for name, width in widths.items():
        if -(-width // tp) * (tp - 1) >= width:
            raise LayoutError(
                f"parallel.tp={tp} leaves ranks without a share of {name}={width}: use a smaller parallel.tp"
            )


def _check_context(layout: Layout, model: ModelConfig, seq_len: int) -> None:
    cp = layout.cp
    if model.type not in SPLITS_SEQUENCES:
        raise LayoutError(
            f"parallel.cp={cp}: a model of type {model.type} can't work on a part of a sequence: use parallel.cp=1, "
            f"and parallel.tp for long sequences"
        )
    heads = model.attention.num_heads // layout.tp
    kv_heads = max(1, known(model.attention.num_kv_heads) // layout.tp)

    def heads_fit(ranks: int) -> bool:
        return heads % ranks == 0 and _shares(kv_heads, ranks)

    if not heads_fit(cp):
        raise LayoutError(
            f"parallel.cp={cp} can't share out the {heads} heads and {kv_heads} kv heads that model.attention has on "
            f"each rank (parallel.tp={layout.tp}): use parallel.cp={_nearest(cp, heads_fit)}"
        )
    if seq_len % cp:
        raise LayoutError(
            f"parallel.cp={cp} doesn't divide the sequences of {seq_len} tokens: use parallel.cp="
            f"{_nearest(cp, lambda ranks: seq_len % ranks == 0 and heads_fit(ranks))}"
        )


def _check_experts(ep: int, model: ModelConfig) -> None:
    if model.moe is None:
        raise LayoutError(f"parallel.ep={ep}: the model has no experts (model.moe): use parallel.ep=1")
    experts = model.moe.num_experts
    if experts % ep:
        raise LayoutError(
            f"parallel.ep={ep} doesn't divide model.moe.num_experts={experts}: use parallel.ep="
            f"{_nearest(ep, lambda ranks: experts % ranks == 0)}"
        )


def _shares(kv_heads: int, ranks: int) -> bool:
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def _nearest(wanted: int, works: Callable[[int], bool]) -> int:
    """The largest size up to the one wanted that works; 1 always does."""
    return next(size for size in range(wanted, 0, -1) if works(size))
