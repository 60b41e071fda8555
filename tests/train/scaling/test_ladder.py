"""A ladder of two very small runs: planned, trained, gone on with, and written down as points."""

import csv
import json
import os
from pathlib import Path

import pytest

from model.count import flops_per_token
from tests.train.running import environment
from train.config_file import load_config
from train.errors import ConfigError, RunError
from train.scaling import ladder
from train.scaling.ladder import Progress, climb, plan_ladder, progress

SIZES, BUDGETS = (3e4, 8e4), (1e9,)
VOCABULARY = "model.vocab_size=304"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)


def test_rungs_spend_their_budget(tiny_config: str, tmp_path: Path) -> None:
    rungs = plan_ladder(tiny_config, [VOCABULARY], SIZES, (4e9, 1e9), tmp_path)
    assert [rung.name for rung in rungs] == ["30K-1e+09", "80K-1e+09", "30K-4e+09", "80K-4e+09"]
    for rung, budget in zip(rungs, (1e9, 1e9, 4e9, 4e9), strict=True):
        model = load_config(rung.config, rung.settings).config.model
        assert rung.flops == pytest.approx(budget, rel=0.15), "whole steps"
        assert rung.flops == rung.tokens * flops_per_token(model, 32)
    assert rungs[0].params == pytest.approx(3e4, rel=0.2) and rungs[1].params == pytest.approx(8e4, rel=0.2)


@pytest.mark.slow
def test_a_ladder_is_climbed_and_gone_on_with(tiny_config: str, tmp_path: Path) -> None:
    rungs = plan_ladder(tiny_config, [VOCABULARY], SIZES, BUDGETS, tmp_path)
    points = tmp_path / "points.csv"
    states = list(climb(rungs, points))
    assert [index for index, state in states if state.done] == [0, 1]
    rows = list(csv.DictReader(points.open()))
    assert [float(row["params"]) for row in rows] == [rung.params for rung in rungs]
    for row, rung in zip(rows, rungs, strict=True):
        last = json.loads(rung.folder.metrics.read_text().splitlines()[-1])
        assert float(row["loss"]) == last["validation_loss"] < 6
        assert (float(row["tokens"]), float(row["flops"])) == (rung.tokens, rung.flops)

    # what is done is not trained again; a run that was cut off goes on
    before = rungs[0].folder.metrics.read_bytes()
    lines = rungs[1].folder.metrics.read_text().splitlines()
    rungs[1].folder.metrics.write_text("\n".join(lines[:3]) + '\n{"step": 4, "lo')
    for checkpoint in rungs[1].folder.checkpoints.iterdir():
        checkpoint.rename(tmp_path / "aside")
    assert progress(rungs[1]) == Progress(3, json.loads(lines[2])["loss"])
    again = list(climb(rungs, points))
    assert again[0][1].done and again[-1][1].done and len(again) > 2
    assert rungs[0].folder.metrics.read_bytes() == before
    assert list(csv.DictReader(points.open())) == rows, "the run does what it did"

    with pytest.raises(RunError, match="was begun with optimizer.lr"):
        plan_ladder(tiny_config, [VOCABULARY, "optimizer.lr=0.5"], SIZES, BUDGETS, tmp_path)


def test_a_run_that_fails_is_told(tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = plan_ladder(tiny_config, [VOCABULARY], SIZES, BUDGETS, tmp_path)
    monkeypatch.setattr(ladder.sys, "executable", "/bin/false")
    with pytest.raises(
        RunError, match=r"30K-1e\+09 failed \(exit code 1; all of it in .*\): it said nothing"
    ):
        list(climb(rungs, tmp_path / "points.csv"))


def test_a_run_that_diverged_is_no_point(tiny_config: str, tmp_path: Path) -> None:
    rungs = plan_ladder(tiny_config, [VOCABULARY], SIZES, BUDGETS, tmp_path)
    for rung, loss in zip(rungs, ("NaN", "3.5"), strict=True):
        rung.folder.path.mkdir()
        rung.folder.metrics.write_text(f'{{"step": {rung.steps}, "loss": 1, "validation_loss": {loss}}}\n')
    assert all(state.done for _, state in climb(rungs, tmp_path / "points.csv"))
    assert [row["loss"] for row in csv.DictReader((tmp_path / "points.csv").open())] == ["3.5"]


@pytest.mark.parametrize(
    ("overrides", "sizes", "budgets", "message"),
    [
        (
            [VOCABULARY],
            (3e4, 3.001e4),
            (1e9,),
            "come to the same run: make --sizes and --budgets more different",
        ),
        ([VOCABULARY], (10,), (1e9,), "dial.params=10 .*is out of reach"),
        ([], (3e4,), (1e9,), "must know the vocabulary: set model.vocab_size"),
        ([VOCABULARY, "run.steps=null", "run.wall_time=1h"], (3e4,), (1e9,), "end with their budget"),
        ([VOCABULARY, "optimizer.lrr=1"], (3e4,), (1e9,), "unknown key"),
    ],
)
def test_mistakes(
    tiny_config: str,
    tmp_path: Path,
    overrides: list[str],
    sizes: tuple[float, ...],
    budgets: tuple[float, ...],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_ladder(tiny_config, overrides, sizes, budgets, tmp_path)
