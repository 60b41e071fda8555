"""A run's folder: what stands where in it, and whether it is this run's."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from data.dataset import open_dataset, write_dataset
from train.checkpoint_folder import complete, step_of
from train.config import Config
from train.config_file import load_config
from train.errors import RunError
from train.resolve import Plan

DECIDES_THE_WEIGHTS = (
    "model",
    "optimizer",
    "schedule",
    "precision",
    "run.seed",
    "data.global_batch_size",
    "data.sources",
    "data.shuffle",
)
"""What may not change between the parts of one run; everything else may."""
DIGESTS = "digests"
"""In a run's `dataset.json`: those of the data sets that it was begun on, by the sources' names."""


class RunFolder:
    """Paths inside of a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.dataset = path / "dataset.json"
        self.tokenizer = path / "tokenizer.model"
        self.samples = path / "samples"
        self.metrics = path / "metrics.jsonl"
        self.faults = path / "faults.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.stopped = path / "stopped"
        """There while a run that a signal stopped waits to be started again."""

    def log_of(self, rank: int) -> Path:
        """What a rank logs."""
        return self.logs / f"rank-{rank:05d}.log"


def folder_of(config: Config) -> RunFolder:
    """The folder that a configuration names."""
    return RunFolder(Path(config.run.dir) / config.run.name)


def open_run(path: str) -> tuple[RunFolder, Config]:
    """An existing run, by its folder, with the configuration it was trained with.

    Raises:
        RunError: it isn't one.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise RunError(
            f"{path} is not a run's folder (no config.yaml): give the folder of a run, such as runs/demo"
        )
    return folder, load_config(str(folder.config)).config


def check_same_run(folder: RunFolder, plan: Plan, called: str | None = None) -> None:
    """Refuse a folder that can't be written, and to go on with a run that another configuration or other data began.

    called: what the folder is a copy of.

    Raises:
        RunError: the first difference, and what to do.
    """
    there = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RunError(f"{folder.path} can't be written: set run.dir to a folder that can")
    if not folder.config.is_file():
        return
    called = called or str(folder.path)
    began = _comparable(load_config(str(folder.config)).config)
    now = _comparable(plan.config)
    # of weights that were imported or averaged only the model is settled
    trained = folder.dataset.is_file() and {step_of(path) for path in complete(folder.checkpoints)} != {0}
    for key in DECIDES_THE_WEIGHTS if trained else ("model",):
        for name, before, after in _differences(key, _at(began, key), _at(now, key)):
            raise RunError(
                f"{called} was begun with {name}={before}, now it is {after}: "
                f"set it back, or begin another run with run.name=NAME"
            )
    if trained and (difference := _other_data(folder, plan)):
        raise RunError(
            f"{called} was begun on other data: {difference}: point data.path or data.sources at what it was, or "
            f"begin another run with run.name=NAME"
        )


def _comparable(config: Config) -> dict[str, Any]:
    """The tree with the proportions of a mixture's sources by their names: their folders may move."""
    tree = config.model_dump(mode="json")
    tree["data"]["sources"] = {source.name: source.proportion for source in config.data.sources}
    return tree


def _other_data(folder: RunFolder, plan: Plan) -> str | None:
    """What differs between the data that the run was begun on and those of the plan, or None."""
    began = json.loads(folder.dataset.read_text())
    if began["digest"] == plan.dataset.digest:
        return None
    where = ", ".join(str(source.info.path) for source in plan.mixture)
    for name in plan.dataset.files:
        if (folder.path / name).read_bytes() != (plan.dataset.path / name).read_bytes():
            return f"the {name} of {where} is another than the run's"
    before = began["options"].get(DIGESTS, {})
    if before.keys() != {source.name for source in plan.mixture}:
        names = ", ".join(source.name for source in plan.mixture)
        return f"its sources were {', '.join(before)}, now they are {names}"
    changed = ", ".join(str(s.info.path) for s in plan.mixture if before[s.name] != s.info.digest)
    then, now = began["train"]["sequences"], plan.dataset.train.sequences
    return f"{changed or where} holds others (of all {then:,} training sequences then, {now:,} now)"


def create(folder: RunFolder, plan: Plan) -> None:
    """Make the folder and write down what the run is; once more where it exists, since some keys may change.

    Raises:
        RunError: the folder can't be written.
    """
    try:
        for path in (folder.checkpoints, folder.tensorboard, folder.logs):
            path.mkdir(parents=True, exist_ok=True)
        folder.stopped.unlink(missing_ok=True)
        folder.config.write_text(to_yaml(plan.config))
        for name in plan.dataset.files:
            shutil.copyfile(plan.dataset.path / name, folder.path / name)
        digests = {source.name: source.info.digest for source in plan.mixture}
        write_dataset(replace(plan.dataset, path=folder.path), {DIGESTS: digests})
    except OSError as error:
        raise RunError(
            f"{folder.path} can't be written: {error.strerror}: set run.dir to a folder that can"
        ) from None


def make_folder(out: Path) -> None:
    """Make a folder that must not be there yet.

    Raises:
        RunError: it is, or can't be made.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise RunError(f"{out} exists: choose another --out, or delete it first") from None
    except OSError as error:
        raise RunError(f"{out} can't be made: {error.strerror}") from None


def vocabulary_files(folder: RunFolder) -> list[Path]:
    """Those that make sense of a run's tokens."""
    if not folder.dataset.is_file():  # an imported run
        return [folder.tokenizer] if folder.tokenizer.is_file() else []
    return [folder.dataset, *(folder.path / name for name in open_dataset(folder.path).files)]


def to_yaml(config: Config) -> str:
    """The whole tree, as `load_config` reads it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def drop_metrics_after(folder: RunFolder, step: int) -> None:
    """Forget the lines of steps that a resumed run will do again."""
    if not folder.metrics.is_file():
        return
    kept = []
    for line in folder.metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:  # cut short when the run was killed
            break
    aside = folder.metrics.with_suffix(".tmp")
    aside.write_text("".join(f"{line}\n" for line in kept))
    aside.replace(folder.metrics)


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics of every step so far; a line that is only half there, as when the run was killed, is none.

    Raises:
        RunError: there are none.
    """
    if not folder.metrics.is_file():
        raise RunError(f"{folder.path} has no metrics.jsonl: train it first")
    return [json.loads(line) for line in folder.metrics.read_text().rpartition("\n")[0].splitlines()]


def _at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def _differences(key: str, before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [d for name in before for d in _differences(f"{key}.{name}", before[name], after.get(name))]
    return [] if before == after else [(key, before, after)]
