"""`trireme verify` passes what is right, at every layout, and finds what is wrong."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from model.config import ModelConfig
from model.model import Model
from model.models import parse_model
from parallel.config import Precision
from parallel.errors import LayoutError
from parallel.fit import check_fit
from parallel.processes import WorkerPools
from tests.train import planted
from train.cli import app
from train.config_file import all_configs, load_config
from train.errors import ConfigError
from train.verify.arrangements import Arrangement, arrangements, parse
from train.verify.batches import Batches
from train.verify.plan import Plan, make_plan
from train.verify.shrink import shrink
from train.verify.trial import Experiment, engine_of
from train.verify.verdict import Finding
from train.verify.verify import verify

STEPS = 3


def findings(
    pools: WorkerPools, folder: Path, config: str, *layouts: str, precision: Precision = "fp64"
) -> list[Finding]:
    """What is found of a configuration at layouts."""
    plan = make_plan(config, [], layouts, "2", STEPS)
    return list(verify(experiment_of(plan, precision, folder), plan.arrangements, pools))


def experiment_of(plan: Plan, precision: Precision, folder: Path) -> Experiment:
    """A short one."""
    return Experiment(plan.model, plan.optimizer, precision, plan.seed, STEPS, plan.global_batch_size, folder)


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        ("llama3", ("dp_shard=2,micro_batch_size=1", "tp=2", "cp=2")),
        ("llama3", ("pp=2,pp_schedule=zbv_zero_bubble",)),
        ("deepseek_moe", ("dp_shard=2,ep=2", "pp=2", "tp=2,activation_checkpoint=selective")),
        ("modern", ("dp_shard=2,activation_checkpoint=auto", "pp=2,activation_checkpoint=auto")),
        ("flow_matching", ("tp=2",)),
        ("image_codes", ("cp=2", "cp=2,cp_method=ring")),
        ("t5", ("tp=2,sequence_parallel=false",)),
    ],
    ids=str,
)
def test_right_layouts_pass(
    pools: WorkerPools, tmp_path: Path, config: str, layouts: tuple[str, ...]
) -> None:
    for finding in findings(pools, tmp_path, config, *layouts):
        assert finding.error is None and finding.refused is None, finding
        assert finding.wrong("fp64") == [], finding


def compiled(experiment: Experiment, arrangement: Arrangement) -> list[bool]:
    """Runs in a worker: whether each of its blocks will be compiled."""
    model = engine_of(experiment, arrangement, seed=0).model
    assert isinstance(model, Model)
    return [layer._compiled_call_impl is not None for layer in model.layers]


@pytest.mark.parametrize("compile", [True, False])
def test_blocks_are_compiled_where_that_is_tried(pools: WorkerPools, tmp_path: Path, compile: bool) -> None:
    """That they then compute the same is `test_all_layouts_of_two_processes`'s to show: it takes a while."""
    experiment = experiment_of(make_plan("modern", [], ["tp=2"], "2", STEPS), "fp64", tmp_path)
    tried = parse(f"tp=2,compile={str(compile).lower()}")
    for blocks in pools[2].run(compiled, experiment, tried):
        assert set(blocks) == {compile}


def recomputed(experiment: Experiment, arrangement: Arrangement) -> set[str]:
    """Runs in a worker: how its blocks recompute."""
    budgeted = engine_of(experiment, arrangement, seed=0).budgeted
    assert budgeted is not None
    return set(budgeted.chosen.values())


@pytest.mark.parametrize("layout", ["dp_shard=2", "pp=2", "cp=2"])
def test_auto_has_a_budget_that_some_blocks_must_recompute_for(
    pools: WorkerPools, tmp_path: Path, layout: str
) -> None:
    experiment = experiment_of(make_plan("modern", [], [layout], "2", STEPS), "fp64", tmp_path)
    for chosen in pools[2].run(recomputed, experiment, parse(f"{layout},activation_checkpoint=auto")):
        assert len(chosen) > 1, chosen


FAULTS: list[tuple[Callable[[], Any], str, set[str]]] = [
    (planted.wrong_gradient_scale, "dp_shard=2", {"grad_norm"}),
    (planted.lost_tie, "pp=2", {"grad_norm", "loss", "weights"}),
    (planted.mean_of_means, "dp_shard=2", {"grad_norm", "loss"}),
    (planted.unsynchronized_norm, "tp=2", {"grad_norm", "loss", "weights"}),
    (planted.skipped_all_reduce, "tp=2,sequence_parallel=false", {"grad_norm", "loss", "weights"}),
    (planted.wrong_rope_offset, "cp=2", {"grad_norm", "loss", "weights"}),
    (planted.wrong_rope_offset, "cp=2,cp_method=ring", {"grad_norm", "loss", "weights"}),
    (planted.unscaled_sums, "cp=2,cp_method=ring", {"grad_norm", "loss", "weights"}),
    (planted.swapped_batch, "dp_shard=2", {"order", "loss", "grad_norm", "weights"}),
]


@pytest.fixture
def faulty(pools: WorkerPools) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Plants a fault in the two processes, for as long as a test takes."""
    yield lambda fault: pools[2].run(planted.plant, fault) and None
    pools[2].run(planted.pull_out)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    ("fault", "layout", "red"), FAULTS, ids=[f"{fault.__name__}-{layout}" for fault, layout, _ in FAULTS]
)
def test_finds_a_planted_fault(
    pools: WorkerPools,
    faulty: Callable[[Callable[[], Any]], None],
    tmp_path: Path,
    fault: Callable[[], Any],
    layout: str,
    red: set[str],
    precision: Precision,
) -> None:
    faulty(fault)
    (finding,) = findings(pools, tmp_path, "modern", layout, precision=precision)
    assert finding.error is None
    assert red <= set(finding.wrong(precision)), finding


ZERO_FAULTS: list[tuple[Callable[[], Any], str, set[str]]] = [
    (planted.zero_averages, "dp_shard=2,stage=2", {"grad_norm"}),
    (planted.zero_averages, "dp_shard=2,stage=3", {"grad_norm"}),
    (planted.zero_takes_shares_for_copies, "tp=2,stage=1", {"grad_norm"}),
    (planted.unsynchronized_norm, "tp=2,stage=3", {"grad_norm", "loss", "weights"}),
]


@pytest.mark.parametrize(
    ("fault", "layout", "red"),
    ZERO_FAULTS,
    ids=[f"{fault.__name__}-{layout}" for fault, layout, _ in ZERO_FAULTS],
)
def test_finds_a_fault_planted_in_zero(
    pools: WorkerPools,
    faulty: Callable[[Callable[[], Any]], None],
    tmp_path: Path,
    fault: Callable[[], Any],
    layout: str,
    red: set[str],
) -> None:
    faulty(fault)
    (finding,) = findings(pools, tmp_path, "modern", f"engine=deepspeed,{layout}", precision="fp32")
    assert finding.error is None and finding.refused is None, finding
    assert red <= set(finding.wrong("fp32")), finding


def test_zero_passes(pools: WorkerPools, tmp_path: Path) -> None:
    layouts = ["dp_shard=2,stage=3", "dp_shard=2,ep=2,stage=2", "tp=2,stage=1", "dp_shard=2,stage=0"]
    written = [f"engine=deepspeed,{layout}" for layout in layouts]
    for finding in findings(pools, tmp_path, "deepseek_moe", *written, precision="fp32"):
        assert finding.error is None and finding.refused is None, finding
        assert finding.wrong("fp32") == [], finding


def test_zero_is_refused_in_fp64(pools: WorkerPools, tmp_path: Path) -> None:
    (finding,) = findings(pools, tmp_path, "modern", "engine=deepspeed,dp_shard=2,stage=1")
    assert finding.refused is not None and "precision=fp32" in finding.refused


def test_a_layout_that_ends_in_an_error_is_told_and_the_next_one_tried(tmp_path: Path) -> None:
    with WorkerPools() as pools:
        pools[2].run(planted.plant, planted.dying_rank)
        broken, right = findings(pools, tmp_path, "modern", "dp_shard=2", "dp_replicate=2")
    assert "planted" in str(broken.error) and broken.wrong("fp64") == ["error"]
    assert right.wrong("fp64") == []


FROM_DATA = ["data.path=made-up", "run.steps=1", "model.vocab_size=2048"]
MODELS = {path.stem: load_config(str(path), FROM_DATA).config.model for path in all_configs()}
SMALL = {name: shrink(model, (1, 2, 4)) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_shrinks_to_a_model_that_takes_the_same_layouts(name: str) -> None:
    """Of the same variants: what is said in words doesn't change."""
    model, small = MODELS[name], SMALL[name]
    assert isinstance(model, ModelConfig) and isinstance(small, ModelConfig)
    for section in ("attention", "positional", "ffn", "norm", "moe"):
        before, after = getattr(model, section), getattr(small, section)
        words = {
            k: v for k, v in (before.model_dump() if before else {}).items() if isinstance(v, str | bool)
        }
        assert words == {key: getattr(after, key) for key in words}
    assert small.d_model <= 64 and small.num_layers <= 4
    for written in {*arrangements(small, 2), *arrangements(small, 4)}:
        assert _refused(parse(written), model) == _refused(parse(written), small), written


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([(1, 2, 4), (2,), (3, 6), (8,)]))
@settings(max_examples=100, deadline=None)
def test_heads_are_shared_out_alike(groups: int, kv_heads: int, worlds: tuple[int, ...]) -> None:
    attention = {"num_heads": groups * kv_heads, "num_kv_heads": kv_heads, "head_dim": 8}
    model = parse_model({"vocab_size": 640, "max_seq_len": 960, "attention": attention})
    small = shrink(model, worlds)
    for tp, cp in product(range(1, 9), repeat=2):
        if any(world % (tp * cp) == 0 for world in worlds):
            arrangement = Arrangement(tp=tp, cp=cp)
            assert _refused(arrangement, model) == _refused(arrangement, small), (tp, cp)


def _refused(arrangement: Arrangement, model: Any) -> bool:
    try:
        check_fit(arrangement.layout, arrangement, model, model.max_seq_len)
    except LayoutError:
        return True
    return False


def test_batches_are_shared_out_whole_and_scored_unevenly() -> None:
    batches = Batches(SMALL["t5"], 8, seed=3)
    whole = batches.share(4, 0, 1)
    parts = [batches.share(4, rank, 4) for rank in range(4)]
    assert [at for part in parts for at in part.sample_ids.tolist()] == whole.sample_ids.tolist()
    assert sorted(whole.sample_ids.tolist()) == list(range(32, 40))
    assert whole.inputs.keys() == {"source", "source_padding", "tokens"}
    scored = (whole.targets != -100).sum(dim=1)
    assert len(set(scored.tolist())) == 8 and scored.min() > 0


@pytest.mark.parametrize(
    ("layouts", "world", "message"),
    [
        (["tp"], "2", "'tp' is not of the form tp=2, with one of"),
        (["tp=2,hp=2"], "2", "'hp=2' is not of the form"),
        (["tp=0"], "2", "layout 'tp=0': tp: "),
        (["dp_shard=-1"], "2", "layout 'dp_shard=-1': dp_shard: "),
        (["stage=2"], "2", "layout 'stage=2': stage is DeepSpeed's: add engine=deepspeed"),
        (["engine=deepspeed,stage=4"], "2", "layout 'engine=deepspeed,stage=4': deepspeed.stage: "),
        (["all"], "2,x", "--world 2,x: give numbers of processes"),
        (["all"], "0", "--world 0: give numbers of processes"),
    ],
)
def test_wrong_input_is_told(layouts: list[str], world: str, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        make_plan("tiny", [], layouts, world, 2)
    assert message in str(told.value)


def test_every_dimension_and_pair_is_tried() -> None:
    four = set(arrangements(SMALL["mixtral"], 4))
    assert {
        "dp_shard=4",
        "dp_replicate=4",
        "tp=4",
        "cp=4",
        "pp=4",
        "dp_shard=2,tp=2",
        "dp_shard=2,dp_replicate=2",
    } < four
    assert {
        "dp_shard=4,ep=4",
        "dp_shard=2,tp=2,ep=2",
        "dp_shard=2,pp=2,ep=2",
        "tp=2,pp=2",
        "cp=2,pp=2",
        "cp=4,cp_method=ring",
        "tp=2,cp=2,cp_method=ring",
    } < four
    assert not any("ep=" in name for name in arrangements(SMALL["gpt2"], 4))
    schedules = {name for name in arrangements(SMALL["gpt2"], 2) if "pp_schedule" in name}
    assert len(schedules) == 4


def test_every_stage_is_tried_with_what_it_can_be_combined_with() -> None:
    four = set(arrangements(SMALL["mixtral"], 4, "deepspeed"))
    for expected in (
        "dp_shard=4,stage=0",
        "dp_shard=4,stage=3,activation_checkpoint=full",
        "dp_shard=4,stage=2,offload_optimizer=cpu",
        "dp_shard=2,tp=2,stage=3",
        "tp=4,stage=1",
        "cp=4,stage=2",
        "dp_shard=4,ep=4,stage=1",
        "dp_shard=2,tp=2,ep=2,stage=2",
    ):
        assert f"engine=deepspeed,{expected}" in four
    assert not any("pp=" in name or "dp_replicate" in name for name in four)
    assert not any("ep=" in name and "stage=3" in name for name in four)
    assert all(parse(name).engine == "deepspeed" for name in four)


def test_both_engines_are_tried_where_asked_for() -> None:
    plan = make_plan("tiny", [], ["all"], "2", 2, engines="deepspeed,torch")
    assert {arrangement.engine for _, arrangement in plan.arrangements} == {"torch", "deepspeed"}
    with pytest.raises(ConfigError, match="--engines jax: give torch or deepspeed"):
        make_plan("tiny", [], ["all"], "2", 2, engines="jax")


def test_every_way_to_recompute_is_tried_and_compiled_blocks_once_on_one_rank_and_on_two() -> None:
    tried = {size: list(arrangements(SMALL["gpt2"], size)) for size in (1, 2, 4, 8)}
    compiled = [name for names in tried.values() for name in names if "compile" in name]
    assert compiled == ["dp_shard=1,compile=true", "tp=2,compile=true"]
    for names in (tried[2], tried[4], tried[8]):
        modes = {name.partition("activation_checkpoint=")[2] for name in names}
        assert modes == {"", "selective", "full", "auto"}
        assert len(names) == len(set(names))


def test_the_command_says_what_passed_and_what_is_refused(
    pools: WorkerPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.verify.verify.WorkerPools", lambda: nullcontext(pools))
    settings = ["--steps", "2", "--layouts", "tp=2", "--layouts", "dp_shard=2,ep=2"]
    done = CliRunner().invoke(app, ["verify", "modern", *settings])
    assert done.exit_code == 0, done.output
    assert "vocab_size 50257 -> 67" in done.output
    assert "1 passed, 0 failed, 1 refused" in done.output and "refused: parallel.ep=2" in done.output


def test_the_command_fails_where_a_layout_does(
    pools: WorkerPools, faulty: Callable[[Callable[[], Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.verify.verify.WorkerPools", lambda: nullcontext(pools))
    faulty(planted.swapped_batch)
    done = CliRunner().invoke(app, ["verify", "modern", "--steps", "3", "--layouts", "dp_shard=2"])
    assert done.exit_code == 1 and "FAIL" in done.output and "0 passed, 1 failed" in done.output


@pytest.mark.slow
def test_all_layouts_of_two_processes() -> None:
    done = CliRunner().invoke(app, ["verify", "mixtral", "--world", "2"])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_an_encoder_and_its_decoder_pass() -> None:
    layouts = ["dp_shard=2", "tp=2", "cp=2,cp_method=ring", "tp=2,activation_checkpoint=selective"]
    asked = [word for layout in layouts for word in ("--layouts", layout)]
    done = CliRunner().invoke(app, ["verify", "t5", "--world", "2", *asked])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_layouts_follow_each_other_whatever_groups_their_ranks_made(
    pools: WorkerPools, tmp_path: Path
) -> None:
    """Of a pipeline's ranks the first and the last alone share an embedding, in a group of their own."""
    for finding in findings(pools, tmp_path, "modern", "pp=4", "tp=2,pp=2", "pp=4"):
        assert finding.error is None and finding.wrong("fp64") == [], finding
