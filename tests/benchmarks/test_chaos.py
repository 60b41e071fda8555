"""The storm of faults: what is drawn, that it strikes, and that differences are seen."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.chaos import RANKS, SPACING, compare, differences, report
from benchmarks.faults.deal import DEALS
from benchmarks.faults.planted import FROM_WITHIN
from benchmarks.faults.schedule import KINDS, STARTING, Fault, draw
from parallel.processes import WorkerPool
from tests.train.running import train_here
from train.run_folder import RunFolder


@pytest.mark.parametrize("seed", range(20))
def test_fifty_faults_are_of_all_kinds_and_can_all_strike(seed: int) -> None:
    faults = draw(50, seed, RANKS, SPACING)
    assert faults == draw(50, seed, RANKS, SPACING) != draw(50, seed + 1, RANKS, SPACING)
    assert {fault.kind for fault in faults} == KINDS.keys()
    before = [KINDS[fault.kind].restarts for fault in faults]
    for fault, starts in zip(faults, [True, *before], strict=False):
        assert fault.point in KINDS[fault.kind].points and fault.rank < RANKS
        assert starts or fault.point not in STARTING
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)


def test_every_kind_is_brought_about() -> None:
    assert KINDS.keys() == DEALS.keys() | FROM_WITHIN.keys()
    assert not DEALS.keys() & FROM_WITHIN.keys()


def test_a_difference_is_seen(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    for name, seed in (("calm", 0), ("same", 0), ("other", 1)):
        overrides = [f"run.dir={tmp_path}", f"run.name={name}", f"run.seed={seed}", "run.steps=2"]
        pools[2].run(train_here, tiny_config, overrides)
    calm, same, other = (RunFolder(tmp_path / name) for name in ("calm", "same", "other"))
    assert differences(calm, same) == []
    assert any("loss" in line for line in differences(calm, other))
    assert any("embedding" in line for line in differences(calm, other))
    rows = [json.loads(line) for line in same.metrics.read_text().splitlines()]
    rows[1]["loss"] += 1e-15
    same.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = differences(calm, same)
    assert line.startswith("step 2: loss ")


STORM = [
    Fault("a worker is stopped for a while", "step", 6, 1),
    Fault("a worker is killed", "save", 10, 1),
    Fault("the clock jumps", "step", 18, 0),
    Fault("a bit of the newest checkpoint flips", "saved", 21, 0),
    Fault("SIGTERM", "step", 27, 1),
]


@pytest.mark.slow
def test_a_run_under_faults_computes_what_it_would_have(tmp_path: Path) -> None:
    told: list[str] = []
    found = compare(tmp_path, STORM, told.append)
    assert found.wrong == []
    assert [outcome.fault for outcome in found.outcomes] == STORM and len(told) == len(STORM)
    assert report(found)[-1] == (
        "weights, optimizer state, losses, gradient norms and data are to the last bit the undisturbed run's"
    )


def test_the_page_names_tests_that_are_there() -> None:
    root = Path(__file__).parent.parent.parent
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "faults.md").read_text()))
    there = {
        name
        for file in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)
    }
    assert len(named) > 20 and not named - there
