"""`trireme plan`: what it says adds up, and what can't be is told in a line that says what would do."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model.count import flops_per_token, parameter_count
from parallel.fit import check_fit, check_micro_batches
from parallel.layout import resolve_layout
from parallel.planner.hardware import load_device
from train.cli import app
from train.config_file import load_config
from train.errors import USER_ERRORS
from train.plan import Budget, arrangement_of, load_for_plan, make_plan, memory_of, run_facts

GPU = load_device("h100-80gb")
DOCS = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_what_is_printed(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "plan.png"
    output = plan("7b", "--gpus", "64", "--tokens", "1T", "--picture", str(picture))
    assert "7b: 6.74B parameters, bf16, 1024 sequences of 4096 tokens in a step" in output
    assert "64 x H100 80GB" in output and "1T tokens" in output and "why it loses" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    (pasted,) = re.findall(r"^  (parallel\..*)$", output, flags=re.MULTILINE)
    given = load_config("7b", ["data.path=unused", *pasted.split()]).config
    assert resolve_layout(given.parallel, 64).world_size == 64
    same = plan("7b", *pasted.split(), "--gpus", "64", "--tokens", "1T", "--layout", "given")
    for line in ("memory", "step", "speed", "run"):
        (first,), (second,) = (
            re.findall(rf"^{line}  .*$", text, flags=re.MULTILINE) for text in (output, same)
        )
        assert first == second, "the keys that are printed make the layout that is planned"


@pytest.mark.parametrize("name", ["7b", "30b"])
def test_keys_undo_what_the_configuration_says(name: str) -> None:
    said = ["parallel.pp=4", "parallel.pp_schedule=interleaved_1f1b", "parallel.stages_per_rank=4"]
    made = make_plan(load_for_plan(name, said), 64, GPU, Budget())
    config = load_for_plan(name, [*said, *made.pasted])
    layout = resolve_layout(config.parallel, 64)
    assert config.parallel.pp_schedule == made.best.arrangement.parallel.pp_schedule or layout.pp == 1
    assert layout == made.best.arrangement.layout
    assert memory_of(config, layout, GPU) == made.best.memory


def test_budgets_agree() -> None:
    """Tokens, FLOPs and days are three ways to say the same."""
    config = load_for_plan("1b", [])
    made = make_plan(config, 8, GPU, Budget(tokens=1e11)).training
    for budget in (Budget(flops=made.flops), Budget(days=made.days)):
        other = make_plan(config, 8, GPU, budget).training
        assert other.tokens == pytest.approx(1e11)
    assert made.device_hours == pytest.approx(8 * 24 * made.days)
    assert made.dollars == pytest.approx(made.device_hours * GPU.dollars_per_hour)
    run = made.best.run
    rate = made.best.tokens_per_second * flops_per_token(run.model, run.seq_len)
    assert made.best.utilization == pytest.approx(rate / 8 / 989e12)


def test_the_optimum_of_a_compute_optimal_run_is_itself() -> None:
    made = make_plan(load_for_plan("7b", []), 64, GPU, Budget()).training
    params, tokens = made.optimum
    assert params == pytest.approx(parameter_count(made.best.run.model).total, rel=0.01)
    assert tokens == pytest.approx(20 * params)


def test_memory_before_a_start() -> None:
    config = load_for_plan("7b", [])
    memory = memory_of(config, resolve_layout(config.parallel, 8), GPU)
    assert memory.weights == pytest.approx(4 * 6_738_415_616 / 8, rel=0.01)
    assert memory.optimizer == 2 * memory.weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7b", "--gpus", "8", "--days", "-1"], "--days -1 is not a positive number of days"),
        (["7b", "--gpus", "8", "--flops", "much"], "--flops: 'much' is not a positive number"),
        (["7b", "--gpus", "8", "--days", "1", "--tokens", "1T"], "give one of them"),
        (["7b", "--gpus", "8", "--tokens", "1000"], "less than the 4.19e+06 of a step: give 4195 times"),
        (["70b", "--gpus", "8"], "use 16 of them"),
        (["7b", "--gpus", "8", "--gpu", "tpu"], "there is no device 'tpu'"),
        (["7b", "precision=fp64", "--gpus", "8"], "precision=fp64"),
        (["7b", "parallel.tp=3", "--gpus", "9", "--layout", "given"], "use parallel.tp=2"),
        (["7b", "data.global_batch_size=12", "--gpus", "8", "--layout", "given"], "data.global_batch_size=8"),
        (["tiny", "--gpus", "8", "--tokens", "1B"], "set model.vocab_size"),
        (["t5", "model.vocab_size=32000", "--gpus", "8", "--tokens", "1T"], "model.type=encoder_decoder"),
        (
            ["7b", "parallel.engine=deepspeed", "parallel.pp=2", "--gpus", "8", "--layout", "given"],
            "use parallel.engine=torch",
        ),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(USER_ERRORS) as told:
        CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_recommended_layouts_can_be_started() -> None:
    """Every cell of the table in the documentation goes through the checks of a run."""
    table = DOCS[DOCS.index("| preset |") :].partition("\n\n")[0].splitlines()
    sizes = [int(cell.replace(",", "").split()[0]) for cell in table[0].strip("| ").split("|")[1:]]
    cells = 0
    for line in table[2:]:
        name, *row = (cell.strip() for cell in line.strip("|").split("|"))
        for size, cell in zip(sizes, row, strict=True):
            if cell == "-":
                continue
            (keys,) = re.findall(r"`(.*)`", cell)
            sections = {
                "micro_batch_size": "data",
                "mode": "activation_checkpoint",
                "n": "activation_checkpoint",
            }
            overrides = [f"{sections.get(key.partition('=')[0], 'parallel')}.{key}" for key in keys.split()]
            if not any(key.startswith("mode=") for key in keys.split()):
                overrides.append("activation_checkpoint.mode=none")
            config = load_for_plan(name, overrides)
            layout = resolve_layout(config.parallel, size)
            check_fit(layout, config.parallel, config.model, config.model.max_seq_len)
            arrangement = arrangement_of(config, layout, GPU)
            check_micro_batches(config.parallel, arrangement.micro_batches(run_facts(config)))
            assert memory_of(config, layout, GPU).total < GPU.memory_bytes
            cells += 1
    assert cells > 20
