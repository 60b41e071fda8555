"""What the planner works out is what a simulated rank of the real job does: memory, FLOPs, bytes per collective."""

from functools import partial
from typing import Any

import pytest
from typer.testing import CliRunner

from model.count import flops_per_token
from parallel.errors import LayoutError
from parallel.layout import resolve_layout
from parallel.planner.compare import Comparison, compare
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.simulate import Simulated, simulate
from tests.parallel.planner.cases import GPT, LLAMA, MOE, arranged, run_of
from tests.parallel.planner.measured import measured_peak
from train.cli import app
from train.config import OptimizerConfig
from train.config_file import load_config
from train.optimizer import make_optimizer

SHALLOW = {
    "model.num_layers": 4,
    "model.max_seq_len": 1024,
    "model.vocab_size": 32000,
    "data.global_batch_size": 64,
    "run.steps": 1,
    "data.path": "unused",
}
"""A preset's own widths, in few layers and short sequences, so that a step takes seconds."""

LAYOUTS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("1b", 64, 0, {}),
    (
        "1b",
        64,
        0,
        {"model.tie_embeddings": False, "activation_checkpoint.mode": "none", "parallel.dp_replicate": 8},
    ),
    ("1b", 64, 0, {"parallel.dp_replicate": 64, "parallel.dp_shard": 1}),
    (
        "1b",
        64,
        0,
        {"activation_checkpoint.mode": "none", "data.micro_batch_size": 8, "data.global_batch_size": 512},
    ),
    ("1b", 1024, 0, {"parallel.tp": 16, "activation_checkpoint.mode": "selective"}),
    ("1b", 256, 0, {"parallel.tp": 4, "parallel.sequence_parallel": False}),
    ("1b", 256, 0, {"parallel.cp": 8, "activation_checkpoint.mode": "none"}),
    ("1b", 512, 0, {"parallel.tp": 4, "parallel.cp": 2, "activation_checkpoint.mode": "every_nth"}),
    ("1b", 256, 0, {"parallel.cp": 8, "parallel.cp_method": "ring", "activation_checkpoint.mode": "none"}),
    ("1b", 512, 0, {"parallel.tp": 4, "parallel.cp": 4, "parallel.cp_method": "ring"}),
    ("1b", 64, 0, {"parallel.pp": 4, "parallel.tp": 2}),
    ("1b", 64, 3, {"parallel.pp": 4, "parallel.tp": 2}),
    (
        "1b",
        64,
        1,
        {"parallel.pp": 2, "parallel.pp_schedule": "interleaved_1f1b", "data.global_batch_size": 256},
    ),
    ("7b", 256, 0, {"parallel.reshard_after_forward": False, "data.global_batch_size": 256}),
    ("moe-8x1b", 64, 0, {"activation_checkpoint.mode": "none"}),
    ("moe-8x1b", 64, 0, {"parallel.ep": 2}),
    ("moe-8x1b", 64, 0, {"parallel.ep": 8, "activation_checkpoint.mode": "none"}),
    (
        "moe-8x1b",
        256,
        0,
        {"parallel.ep": 4, "parallel.tp": 2, "parallel.cp": 2, "data.global_batch_size": 64},
    ),
]


def of_preset(name: str, ranks: int, overrides: dict[str, Any]) -> tuple[RunFacts, Arrangement]:
    config = load_config(name, [f"{key}={value}" for key, value in overrides.items()]).config
    parallel = config.parallel.model_copy(
        update={"dp_shard": resolve_layout(config.parallel, ranks).dp_shard}
    )
    run = RunFacts(config.model, config.model.max_seq_len, config.data.global_batch_size, config.precision)  # type: ignore[arg-type]
    return run, Arrangement(parallel, config.data.micro_batch_size, config.activation_checkpoint)


def simulated(run: RunFacts, arrangement: Arrangement, place: int = 0) -> Simulated:
    return simulate(run, arrangement, place, partial(make_optimizer, config=OptimizerConfig()))


def check(comparison: Comparison) -> None:
    """Within a tenth for memory, and a twentieth for FLOPs and bytes, of which each kind by itself."""
    assert comparison.total("memory").planned == pytest.approx(comparison.total("memory").simulated, rel=0.1)
    by_name = {figure.name: figure for figure in comparison.figures}
    for part in ("weights", "optimizer"):
        assert by_name[part].planned == pytest.approx(by_name[part].simulated, rel=0.01), part
    counted = [figure for figure in comparison.figures if figure.group != "memory"]
    assert len(counted) > 2
    for figure in counted:
        assert figure.planned == pytest.approx(figure.simulated, rel=0.05), figure.name


@pytest.mark.parametrize(("name", "ranks", "place", "overrides"), LAYOUTS, ids=str)
def test_a_plan_is_what_a_rank_does(name: str, ranks: int, place: int, overrides: dict[str, Any]) -> None:
    run, arrangement = of_preset(name, ranks, SHALLOW | overrides)
    check(compare(run, arrangement, place, simulated(run, arrangement, place)))


@pytest.mark.slow
def test_the_70b_preset_on_4096_ranks() -> None:
    overrides = {"run.steps": 1, "data.path": "unused", "parallel.tp": 8, "parallel.dp_replicate": 2}
    run, arrangement = of_preset("70b", 4096, overrides)
    assert arrangement.layout.world_size == 4096
    check(compare(run, arrangement, 0, simulated(run, arrangement)))


@pytest.mark.parametrize(
    ("model", "sizes", "again"),
    [
        (LLAMA, {"dp_shard": 4}, "none"),
        (LLAMA, {"dp_shard": 2, "tp": 4}, "selective"),
        (LLAMA, {"dp_replicate": 2, "dp_shard": 2, "cp": 2}, "full"),
        (GPT, {"dp_shard": 4}, "every_nth"),
        (MOE, {"dp_shard": 4}, "full"),
    ],
    ids=["sharded", "tensor", "context", "gpt", "experts"],
)
def test_memory_is_what_real_tensors_take(model: dict[str, Any], sizes: dict[str, int], again: str) -> None:
    """The CPU's allocator, in the same step on tensors that have values, has the same peak."""
    run, arrangement = run_of(model, sequences=8), arranged(2, again, **sizes)
    took = sum(simulated(run, arrangement).memory.values())
    assert took == pytest.approx(measured_peak(run, arrangement), rel=0.03)


def test_flops_of_all_ranks_together_are_the_models() -> None:
    """Without recomputation; of causal attention's backward the scores are made twice."""
    run, arrangement = run_of(LLAMA, sequences=8), arranged(2, dp_shard=2, tp=2, cp=2)
    step = simulated(run, arrangement)
    ranks, model = (
        arrangement.layout.world_size,
        flops_per_token(run.model, run.seq_len) * run.tokens_per_step,
    )
    assert ranks * (step.matmul + step.attention * 3 / 3.5) == pytest.approx(model, rel=0.01)


def test_collectives_are_counted_by_kind_and_dimension() -> None:
    """Of a step of two micro-batches, whose shapes are known."""
    run, arrangement = run_of(LLAMA, sequences=8), arranged(2, dp_shard=2, cp=4)
    traffic = simulated(run, arrangement).traffic
    # four exchanges of each layer's attention, forward and backward, in each micro-batch
    assert traffic["all_to_all", "cp"].count == 2 * 4 * 4 * 2
    # a layer's weights are gathered twice in each, the root's once
    assert traffic["all_gather", "dp_shard"].count == 2 * (4 * 2 + 1)
    assert traffic["reduce_scatter", "dp_shard"].count == 2 * (4 + 1)
    assert not {dimension for _, dimension in traffic} & {"tp", "pp", "ep", "dp_replicate"}


def test_keys_and_values_go_round_and_their_gradients_after_them() -> None:
    """Of 4 kv heads of 16 numbers, a quarter of 256 places; gradients are in fp32. More ranks than heads can be."""
    run, arrangement = run_of(LLAMA, sequences=8), arranged(2, dp_shard=2, cp=4, cp_method="ring")
    sent = simulated(run, arrangement).traffic["send", "cp"]
    passes = 2 * 4 * 2 * 3  # micro-batches, layers, of keys and of values, to three ranks
    assert sent.count == passes * 3
    assert sent.bytes == passes * (2 * 64 * 4 * 16) * (2 + 2 + 4)


@pytest.mark.parametrize("again", ["selective", "full"])
def test_a_ring_does_the_work_of_heads(again: str) -> None:
    """The same products, and as much attention on every rank."""
    run = run_of(LLAMA, sequences=8)
    ring, heads = (
        simulated(run, arranged(2, again, dp_shard=2, cp=4, cp_method=method)) for method in ("ring", "heads")
    )
    assert ring.matmul == heads.matmul
    assert ring.attention == pytest.approx(heads.attention, rel=1e-9)
    assert not any(kind == "all_to_all" for kind, _ in ring.traffic)


def test_activations_are_sent_between_stages() -> None:
    run, arrangement = run_of(LLAMA, sequences=8), arranged(1, pp=4)
    size = run.seq_len * run.model.d_model * run.itemsize
    for place, neighbours in ((0, 1), (1, 2), (3, 1)):
        sent = simulated(run, arrangement, place).traffic["send", "pp"]
        # torch 2.11 tries each connection with a number
        tried = sent.count - 8 * neighbours
        assert tried in (0, neighbours) and sent.bytes == 8 * neighbours * size + 4 * tried


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"engine": "deepspeed"}, "parallel.engine=deepspeed"),
        ({"cpu_offload": True}, "parallel.cpu_offload=true"),
        ({"pp": 2, "pp_schedule": "zbv_zero_bubble"}, "activation_checkpoint.mode=full"),
    ],
)
def test_what_cant_be_simulated_is_refused_in_one_line(parallel: dict[str, Any], named: str) -> None:
    with pytest.raises(LayoutError, match=f"^{named}.* use [^\n]*$"):
        simulated(run_of(LLAMA, sequences=8), arranged(1, "full", **parallel))


def test_the_command_shows_both_sides() -> None:
    """And says in one line what can't be simulated."""
    sizes = ["model.vocab_size=512", "model.num_layers=2", "data.micro_batch_size=1"]
    command = ["plan", "tiny", *sizes, "parallel.tp=2", "--gpus", "8", "--layout", "given", "--simulate"]
    done = CliRunner().invoke(app, [*command, "run.steps=1"])
    assert done.exit_code == 0, done.output
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if line.startswith("│")]
    totals = {row[0].strip(): row[4].strip() for row in rows if row[1].strip() == "total"}
    assert set(totals) == {"memory", "FLOPs", "traffic"}
    assert all(abs(float(totals[group].rstrip("%"))) <= 5 for group in ("FLOPs", "traffic"))
    refused = CliRunner().invoke(app, [*command, "run.steps=1", "compile.enabled=true"])
    assert isinstance(refused.exception, LayoutError)
