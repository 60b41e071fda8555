"""Dropout draws alike on ranks that hold the same activation, and differently where they hold different ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel.processes import WorkerPool
from tests.parallel.parity import make_engine, share_of

DROPOUT = {"dropout": 0.5, "ffn": {"dropout": 0.5}, "attention": {"dropout": 0.5}}


def kept(layout: dict[str, int], parallel: dict[str, Any]) -> list[tuple[tuple[int, ...], list[bool]]]:
    """Runs in every worker: shape and mask of every dropout outside of attention in a step, as they come."""
    found = []

    def recording(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        mask = torch.rand_like(x) >= p if training else torch.ones_like(x, dtype=torch.bool)
        found.append((tuple(x.shape), mask.flatten().tolist()))
        return x * mask / (1 - p)

    engine = make_engine(layout, 4, "fp64", parallel, DROPOUT)
    plain, F.dropout = F.dropout, recording
    try:
        loss = engine.forward_backward(share_of(engine, 0), 0)
    finally:
        F.dropout = plain
    assert loss.isfinite()
    return found


def by_shape(drops: list[tuple[tuple[int, ...], list[bool]]], shape: tuple[int, ...]) -> list[list[bool]]:
    return [mask for of, mask in drops if of == shape]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel(pools: dict[int, WorkerPool], sequence_parallel: bool) -> None:
    first, second = pools[2].run(kept, {"tp": 2}, {"sequence_parallel": sequence_parallel})
    assert [shape for shape, _ in first] == [shape for shape, _ in second]
    whole, shared, features = (4, 12, 24), (4, 6, 24), (4, 12, 20)
    assert by_shape(first, whole) == by_shape(second, whole) != []
    assert all(a != b for a, b in zip(by_shape(first, features), by_shape(second, features), strict=True))
    assert bool(by_shape(first, shared)) == sequence_parallel
    assert all(a != b for a, b in zip(by_shape(first, shared), by_shape(second, shared), strict=True))


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"cp": 2}])
def test_other_tokens_other_draws(pools: dict[int, WorkerPool], layout: dict[str, int]) -> None:
    first, second = pools[2].run(kept, layout, {})
    assert first and all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"tp": 2}, {"cp": 2}])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_draw_the_same_again(
    pools: dict[int, WorkerPool], layout: dict[str, int], mode: str
) -> None:
    for rank in pools[2].run(kept, layout, {"activation_checkpoint": {"mode": mode}}):
        inner = [mask for shape, mask in rank if len(mask) > 1]
        # of two micro-batches: the embedding's once, each block's again in the backward
        assert len({str(mask) for mask in inner}) < len(inner)
        assert all(inner.count(mask) in (1, 2) for mask in inner)


def test_replicas_of_tokens_draw_from_the_step(pools: dict[int, WorkerPool]) -> None:
    again = [pools[2].run(kept, {"tp": 2}, {}) for _ in range(2)]
    assert again[0] == again[1]
