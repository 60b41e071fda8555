"""What the engine deepspeed does beside computing the same run: states that move, refusals, its library's keys."""

import re
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from data.stream import Batch
from parallel.config import CompileConfig, ParallelConfig
from parallel.engine import Engine
from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.processes import WorkerPool
from parallel.zero.config import DeepSpeedConfig, library_config
from parallel.zero.fit import check_zero
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
from tests.parallel.test_layouts import MOE
from train import checkpoint, checkpoint_folder
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig


# Measured here over these 20 steps: at most 2e-2 of the loss.
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lower_precision_stays_near(pools: dict[int, WorkerPool], stage: int) -> None:
    initial, losses, norms = reference({}, "fp32")
    everywhere: dict[str, str] = {}
    for rank_initial, rank_losses, rank_norms in pools[2].run(
        train, {"dp_shard": 2}, 2, "bf16", zero(stage), {}
    ):
        assert rank_losses == pytest.approx(losses, rel=5e-2)
        assert rank_norms == pytest.approx(norms, rel=0.2)
        everywhere |= rank_initial
    assert everywhere == initial, "weights start in fp32, not rounded"


def refused(precision: str, parallel: dict[str, Any]) -> str:
    """Runs in every worker: why it is."""
    try:
        make_engine({}, 4, precision, parallel, {})
    except LayoutError as error:
        return str(error)
    return ""


def test_fp16_is_refused_on_a_cpu(pools: dict[int, WorkerPool]) -> None:
    (message,) = pools[1].run(refused, "fp16", zero(1))
    assert (
        message == "precision=fp16: DeepSpeed has none on a CPU: use precision=bf16, or parallel.engine=torch"
    )


def test_a_key_that_deepspeed_does_not_know_is_told_in_a_line(pools: dict[int, WorkerPool]) -> None:
    unknown = zero(1, config={"zero_optimization": {"overlap_com": True}})
    (message,) = pools[1].run(refused, "fp32", unknown)
    assert message == (
        "parallel.deepspeed.config: DeepSpeedZeroConfig refuses overlap_com=True: Extra inputs are not permitted"
    )


def step_with_infinite_loss(precision: str, stage: int) -> Any:
    """Runs in every worker: the norm, and whether the weights stayed, of a step with an infinite loss on one rank."""
    engine = make_engine({"dp_shard": 2}, 4, precision, zero(stage), {})
    first = digests(engine.weights())
    engine.forward_backward(share_of(engine, 0), 0)
    engine.step(LR)
    before = digests(engine.weights())
    if engine.mesh.data_rank == 1:
        weight = engine._loss_weight()
        engine._loss_weight = lambda: weight * float("inf")  # type: ignore[method-assign]
    engine.forward_backward(share_of(engine, 1), 1)
    norm = engine.step(LR).item()
    return before == first, before == digests(engine.weights()), norm


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_without_a_finite_gradient(pools: dict[int, WorkerPool], precision: str, stage: int) -> None:
    for first_stayed, stayed, norm in pools[2].run(step_with_infinite_loss, precision, stage):
        assert not first_stayed
        assert stayed
        assert not isfinite(norm)


STATES: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (4, {"dp_shard": 4}, zero(2)),
    (2, {"dp_shard": 2}, {}),
    (3, {"dp_shard": 3}, zero(3)),
    (1, {}, zero(1)),
    (4, {"dp_shard": 2, "tp": 2}, zero(1)),
    (2, {"dp_shard": 2}, zero(0)),
    (4, {"dp_shard": 2, "tp": 2}, zero(3)),
    (4, {"dp_shard": 4, "ep": 2}, zero(2)),
    (4, {"dp_shard": 4}, {}),
    (2, {"dp_shard": 2}, zero(3, offload_optimizer="cpu")),
    (4, {"dp_shard": 4, "ep": 2}, {}),
    (2, {"tp": 2}, {}),
    (2, {"dp_shard": 2, "ep": 2}, zero(1)),
]
"""Processes, layout and engine, each of which goes on from the one before."""


MOVING = {"moe": MOE, "ffn": {"bias": True}}


def twelve(step: int, engine: Engine) -> Batch:
    """This rank's share of twelve sequences, which three ranks can share out as well as four."""
    eight, more = global_batch(2 * step), global_batch(2 * step + 1)
    pairs = ((eight.inputs["tokens"], more.inputs["tokens"]), (eight.targets, more.targets))
    tokens, targets = (torch.cat([all_of, others[:4]]) for all_of, others in pairs)
    batch = Batch({"tokens": tokens}, targets, torch.arange(12))
    return list(batch.micro_batches(12 // engine.layout.data_size))[engine.mesh.data_rank]


def losses_of_one() -> list[float]:
    """Runs in one worker: of as many steps, with the torch engine."""
    engine, losses = make_engine({}, 1, "fp32", {}, MOVING), []
    for step in range(len(STATES)):
        losses.append(engine.forward_backward(twelve(step, engine), step).item())
        engine.step(LR)
    return losses


def take_over(
    layout: dict[str, int], parallel: dict[str, Any], folder: str, number: int
) -> tuple[dict[str, str], float, dict[str, str]]:
    """Runs in every worker: the state that came from a checkpoint, the loss of a step on it, the state after."""
    engine = make_engine(layout, 1, "fp32", parallel, MOVING)
    before, after = Path(folder) / str(number - 1), Path(folder) / str(number)
    if number:
        (path,) = checkpoint_folder.complete(before)
        engine.restore(lambda tensors: checkpoint.load_tensors(path, tensors))
    came = digests(engine.state())
    loss = engine.forward_backward(twelve(number, engine), number).item()
    engine.step(LR)
    checkpoint.save(after, engine.state(), Progress(number + 1, 0, {}), CheckpointConfig(keep=1), {})
    return came, loss, digests(engine.state())


@pytest.mark.slow
def test_state_moves_between_engines_to_the_last_bit(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    (expected,) = pools[1].run(losses_of_one)
    left: dict[str, str] = {}
    for number, (ranks, layout, parallel) in enumerate(STATES):
        results = pools[ranks].run(take_over, layout, parallel, str(tmp_path), number)
        came, after = {}, {}
        for rank_came, loss, rank_after in results:
            came |= rank_came
            after |= rank_after
            assert loss == pytest.approx(expected[number], rel=1e-5), (number, layout, parallel)
        assert not number or came == left, (number, layout, parallel)
        left = after


def refusal(parallel: dict[str, Any], precision: str = "fp32", *, compiled: bool = False) -> str:
    """What is said of a layout on as many ranks as it has."""
    config = ParallelConfig(**({"dp_shard": 1} | parallel))
    layout = Layout(
        **{name: getattr(config, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")}
    )
    with pytest.raises(LayoutError) as error:
        check_zero(layout, config, precision, CompileConfig(enabled=compiled))  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize(
    ("parallel", "precision", "instead"),
    [
        ({"pp": 2} | zero(1), "fp32", "use parallel.engine=torch, or parallel.pp=1"),
        ({"dp_replicate": 2} | zero(2), "fp32", "use parallel.dp_replicate=1"),
        (zero(1), "fp64", "use parallel.engine=torch, or precision=fp32"),
        ({"dp_shard": 2, "ep": 2} | zero(3), "fp32", "use parallel.deepspeed.stage=1 or 2, or parallel.ep=1"),
        ({"dp_shard": 2, "ep": 2} | zero(0), "fp32", "use parallel.deepspeed.stage=1 or 2, or parallel.ep=1"),
        ({"reshard_after_forward": False} | zero(3), "fp32", "use parallel.deepspeed.stage=2"),
        ({"cpu_offload": True} | zero(2), "fp32", "use parallel.deepspeed.offload_optimizer=cpu"),
    ],
)
def test_what_it_cannot_do_is_refused_with_what_works(
    parallel: dict[str, Any], precision: str, instead: str
) -> None:
    message = refusal(parallel, precision)
    assert instead in message and "\n" not in message


def test_compiled_blocks_are_refused_at_stage_3() -> None:
    assert "use parallel.deepspeed.stage=2, or parallel.engine=torch" in refusal(zero(3), compiled=True)


def test_not_installed_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(zero(1)).startswith(
        "parallel.engine=deepspeed, but DeepSpeed isn't installed: pip install"
    )


def rendered(section: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    return library_config(
        DeepSpeedConfig(**section), precision, micro_batch_size=4, accumulation_steps=2, max_grad_norm=0.5
    )


def test_raw_keys_are_merged() -> None:
    raw = {
        "zero_optimization": {"stage": "auto", "overlap_comm": True, "zero_hpz_partition_size": 2},
        "gradient_clipping": 0.5,
        "communication_data_type": "bf16",
        "comms_logger": {"enabled": True},
    }
    merged = rendered({"stage": 3, "config": raw}, "bf16")
    assert merged["zero_optimization"] == {"stage": 3, "overlap_comm": True, "zero_hpz_partition_size": 2}
    assert merged["gradient_clipping"] == 0.5 and merged["gradient_accumulation_steps"] == 2
    assert merged["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert merged["communication_data_type"] == "bf16", "a default of ours, not the run's word"
    assert merged["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"zero_optimization": {"stage": 1}},
            "parallel.deepspeed.config has zero_optimization.stage=1, but parallel.deepspeed.stage says 2: leave one "
            "of them out",
        ),
        ({"gradient_clipping": 1.0}, "has gradient_clipping=1.0, but optimizer.max_grad_norm says 0.5"),
        ({"fp16": {"enabled": True}}, "has fp16.enabled=True, but precision says False"),
        (
            {"optimizer": {"type": "Adam"}},
            "has optimizer.type, which the optimizer section says: leave it out",
        ),
        ({"zero_optimization": {"round_robin_gradients": True}}, "when they are saved: leave it out"),
        ({"train_batch_size": 64}, "has train_batch_size, which data.global_batch_size says: leave it out"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        rendered({"config": raw})


@pytest.mark.parametrize(
    ("section", "instead"),
    [
        ({"stage": 2, "offload_param": "cpu"}, "use parallel.deepspeed.stage=3, or leave it out"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "needs parallel.deepspeed.stage=1, 2 or 3"),
        (
            {"stage": 1, "offload_optimizer": "nvme", "nvme_path": "x"},
            "parallel.deepspeed.offload_optimizer=cpu",
        ),
        ({"stage": 3, "offload_optimizer": "nvme"}, "give both or neither"),
        ({"nvme_path": "x"}, "give both or neither"),
    ],
)
def test_a_section_that_cannot_be(section: dict[str, Any], instead: str) -> None:
    with pytest.raises(ValueError, match=re.escape(instead)):
        DeepSpeedConfig(**section)
