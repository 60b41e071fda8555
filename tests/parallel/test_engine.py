"""What the engine does besides computing the same run in every layout: balance, lower precision, overflow."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from model.transformer import Trunk
from parallel.processes import WorkerPool
from tests.parallel.parity import (
    LR,
    digests,
    global_batch,
    make_engine,
    reference,
    share_of,
    train,
    zero,
)

MOE = {"num_experts": 6, "d_ff": 20, "load_balance_loss": 0.1, "router_z_loss": 0.01}
BIASED: dict[str, Any] = {
    "moe": MOE | {"router": "sigmoid", "balance": "bias", "bias_rate": 0.01},
    "ffn": {"bias": True},
}


def balance_after_three_steps(layout: dict[str, int], micro: int, parallel: dict[str, Any]) -> Any:
    """Runs in every worker: the experts' load in the last step, and the biases that came of all three."""
    settings = {"activation_checkpoint": {"mode": "full"}} | parallel
    engine = make_engine(layout, micro, "fp64", settings, BIASED | {"num_layers": 4})
    for step in range(3):
        engine.forward_backward(share_of(engine, step), step)
        engine.step(LR)
    statistics = engine.expert_statistics()
    assert statistics is not None
    biases = {name: t.tolist() for name, t in engine.state().items() if name.endswith("selection_bias")}
    return statistics.load.tolist(), statistics.dropped.tolist(), biases


@pytest.mark.parametrize(
    ("layout", "micro", "parallel"),
    [
        ({"dp_shard": 2}, 1, {}),
        ({"tp": 2}, 4, {}),
        ({"cp": 2}, 8, {}),
        ({"dp_shard": 2, "ep": 2}, 2, {}),
        ({"pp": 2}, 2, {"pp_schedule": "interleaved_1f1b"}),
    ],
)
def test_experts_are_balanced_by_the_whole_step(
    pools: dict[int, WorkerPool], layout: dict[str, int], micro: int, parallel: dict[str, Any]
) -> None:
    ((load, dropped, biases),) = pools[1].run(balance_after_three_steps, {}, 8, {})
    assert [sum(layer) for layer in load] == pytest.approx([1.0] * 4) and dropped == [0.0] * 4
    assert len(biases) == 4 and all(any(bias) for bias in biases.values())
    everywhere = {}
    for rank_load, rank_dropped, rank_biases in pools[2].run(
        balance_after_three_steps, layout, micro, parallel
    ):
        assert (rank_load, rank_dropped) == (load, dropped)
        everywhere |= rank_biases
    assert everywhere == biases


# Measured here over these 20 steps: at most 2e-2 of the loss.
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near(pools: dict[int, WorkerPool], precision: str) -> None:
    _, losses, _ = reference({})
    for _, rank_losses, rank_norms in pools[2].run(train, {"dp_shard": 2}, 2, precision, {}, {}):
        assert rank_losses == pytest.approx(losses, rel=5e-2)
        assert all(torch.isfinite(torch.tensor(rank_norms)))


def step_with_infinite_gradient() -> Any:
    """Runs in every worker: weights before and after a step whose gradient is infinite on one rank."""
    engine = make_engine({"dp_shard": 2}, 4, "fp16", {}, {})
    batch = next(global_batch(0).micro_batches(4))
    engine.forward_backward(batch, 0)
    engine.step(LR)
    before, scale = digests(engine.weights()), engine.loss_scale.scale.item()
    engine.forward_backward(batch, 1)
    if dist.get_rank() == 1:
        gradient = next(p.grad for p in engine.model.parameters() if p.grad is not None)
        gradient.to_local().fill_(float("inf"))  # type: ignore[attr-defined]
    engine.step(LR)
    return before == digests(engine.weights()), engine.loss_scale.scale.item() / scale


def test_overflow_skips_the_step_on_all_ranks(pools: dict[int, WorkerPool]) -> None:
    assert pools[2].run(step_with_infinite_gradient) == [(True, 0.5), (True, 0.5)]


def step_with_infinite_loss(layout: dict[str, int], parallel: dict[str, Any]) -> Any:
    """Runs in every worker: loss and norm of a step whose loss, but not its gradient, is infinite on one rank."""
    engine = make_engine(layout, 2, "fp32", parallel, {})
    before = digests(engine.weights())
    finish = Trunk.finish
    plus = math.inf if dist.get_rank() == dist.get_world_size() - 1 else 0.0
    with patch.object(Trunk, "finish", lambda *args: finish(*args) + plus):
        loss = engine.forward_backward(share_of(engine, 0), 0)
    norm = engine.step(LR)
    return before == digests(engine.weights()), loss.item(), norm.item()


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [
        ({"dp_shard": 2}, {}),
        ({"dp_replicate": 2}, {}),
        ({"cp": 2}, {}),
        ({"pp": 2}, {}),
        ({"dp_shard": 2}, zero(0)),
        ({"dp_shard": 2}, zero(2)),
    ],
)
def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(
    pools: dict[int, WorkerPool], layout: dict[str, int], parallel: dict[str, Any]
) -> None:
    for stayed, loss, norm in pools[2].run(step_with_infinite_loss, layout, parallel):
        assert stayed
        assert not math.isfinite(loss) and not math.isfinite(norm)
