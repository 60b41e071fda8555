"""Which checkpoints stay: the newest, every n-th, and the best."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.fake_checkpoints import fake_checkpoint
from train.checkpoint_folder import MANIFEST, complete, step_of
from train.config import CheckpointConfig
from train.retention import prune, reasons_to_stay

LOSSES = {100: 3.0, 200: 2.5, 300: 2.5, 400: None, 500: float("nan"), 600: 2.9, 700: 2.7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven checkpoints; of two the validation loss is of no use."""
    for step, loss in LOSSES.items():
        fake_checkpoint(tmp_path, step, loss)
    return tmp_path


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        ({"keep": 1}, [700]),
        ({"keep": 3}, [500, 600, 700]),
        ({"keep": 9}, list(LOSSES)),
        ({"keep": 1, "every_steps": 100, "keep_every": 300}, [300, 600, 700]),
        ({"keep": 1, "keep_best": 1}, [300, 700]),
        ({"keep": 1, "keep_best": 2}, [200, 300, 700]),
        ({"keep": 2, "keep_best": 9}, [100, 200, 300, 600, 700]),
        ({"keep": 1, "every_steps": 100, "keep_every": 400, "keep_best": 3}, [200, 300, 400, 700]),
    ],
)
def test_prune_leaves_what_the_rules_keep(folder: Path, rules: dict[str, Any], stay: list[int]) -> None:
    gone = prune(folder, CheckpointConfig(**rules))
    assert [step_of(path) for path in complete(folder)] == stay
    assert [step_of(path) for path in gone] == [step for step in LOSSES if step not in stay]
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in stay]


def test_says_why_each_stays(folder: Path) -> None:
    rules = CheckpointConfig(keep=1, every_steps=100, keep_every=700, keep_best=1)
    reasons = {step_of(path): why for path, why in reasons_to_stay(folder, rules).items()}
    assert reasons == {step: [] for step in LOSSES} | {300: ["best"], 700: ["newest", "for ever"]}


def test_damaged_manifest_is_never_the_best(folder: Path) -> None:
    (folder / "step-00000300" / MANIFEST).write_text("{")
    assert [step_of(path) for path in prune(folder, CheckpointConfig(keep=1, keep_best=1))] == [
        100,
        300,
        400,
        500,
        600,
    ]
