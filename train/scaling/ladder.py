"""A ladder of small runs, each size at each budget, one after another, for a law to be fitted to."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.config import ModelConfig
from model.count import flops_per_token, parameter_count
from train.config_file import load_config
from train.counts import format_count
from train.errors import ConfigError, RunError
from train.resolve import resolve
from train.run_folder import RunFolder, check_same_run, folder_of
from train.scaling.points import Points, write_points

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Rung:
    """A run of the ladder. `trireme train CONFIG *settings` is what trains it."""

    config: str
    settings: tuple[str, ...]
    folder: RunFolder
    params: int
    """Those that a token meets."""
    tokens: int
    flops: float
    steps: int

    @property
    def name(self) -> str:
        """Of the run, by its size and budget."""
        return self.folder.path.name


class Progress(NamedTuple):
    """How far a run is."""

    step: int = 0
    loss: float | None = None
    """On the training split, and on the validation split when it is done."""
    done: bool = False


def plan_ladder(
    config: str, overrides: Sequence[str], sizes: Sequence[float], budgets: Sequence[float], out: Path
) -> list[Rung]:
    """The runs, from the cheapest budget; all are checked before one is started.

    Raises:
        ConfigError, RunError, LayoutError, InputError: what is wrong with one of them.
    """
    rungs = [
        _plan(config, overrides, size, budget, out) for budget in sorted(budgets) for size in sorted(sizes)
    ]
    seen: dict[object, Rung] = {}
    for rung in rungs:
        for key in (rung.name, (rung.params, rung.tokens)):
            other = seen.setdefault(key, rung)
            if other is not rung:
                raise ConfigError(
                    f"{other.name} and {rung.name} come to the same run: make --sizes and --budgets more different"
                )
    return rungs


def climb(rungs: Sequence[Rung], points: Path) -> Iterator[tuple[int, Progress]]:
    """Train what is not trained yet. Yields which run is how far; `points` holds those that are done.

    A run whose loss is no number has diverged, and is no point.

    Raises:
        RunError: a run failed.
    """
    losses: list[float] = []
    for index, rung in enumerate(rungs):
        if not progress(rung).done:
            for state in _train(rung, points.parent / f"{rung.name}.log"):
                yield index, state
        final = progress(rung)
        losses.append(math.nan if final.loss is None else final.loss)
        _write(points, rungs[: index + 1], losses)
        yield index, final


def gather(rungs: Sequence[Rung], points: Path) -> list[Progress]:
    """How far the runs are, however they are trained; `points` then holds those that are done."""
    states = [progress(rung) for rung in rungs]
    done = [(rung, state.loss) for rung, state in zip(rungs, states, strict=True) if state.done]
    _write(points, [rung for rung, _ in done], [math.nan if loss is None else loss for _, loss in done])
    return states


def progress(rung: Rung) -> Progress:
    """How far a run is, by the last line of its metrics that is whole."""
    lines = rung.folder.metrics.read_text().splitlines() if rung.folder.metrics.is_file() else []
    for line in reversed(lines):
        with suppress(json.JSONDecodeError):  # cut short when the run was killed
            last = json.loads(line)
            done = last["step"] == rung.steps and "validation_loss" in last
            return Progress(last["step"], last["validation_loss" if done else "loss"], done)
    return Progress()


def _plan(config: str, overrides: Sequence[str], size: float, budget: float, out: Path) -> Rung:
    name = f"{format_count(size)}-{budget:.3g}"
    dialled = (f"dial.params={size:.6g}", f"dial.flops={budget:.6g}", f"run.dir={out}", f"run.name={name}")
    plan = resolve(load_config(config, [*dialled, *overrides]))
    if plan.total_steps is None:
        raise ConfigError("a ladder's runs end with their budget: leave out run.steps and run.wall_time")
    # the loss of the end is what counts; before it there is no need to know it
    settings = (*dialled, f"evaluation.every_steps={plan.total_steps}", *overrides)
    folder, model = folder_of(plan.config), plan.config.model
    check_same_run(folder, plan)
    assert isinstance(model, ModelConfig), "the dial refuses others"
    tokens = plan.total_steps * plan.tokens_per_step
    flops = tokens * flops_per_token(model, plan.dataset.seq_len)
    return Rung(config, settings, folder, parameter_count(model).active, tokens, flops, plan.total_steps)


def _train(rung: Rung, log: Path) -> Iterator[Progress]:
    """Train in a process of its own, which goes on from the newest checkpoint; its output goes into the log."""
    command = [sys.executable, "-m", "train.cli", "train", rung.config, *rung.settings]
    with (
        log.open("a") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            yield progress(rung)._replace(done=False)
            time.sleep(POLL_SECONDS)
    if process.returncode or not progress(rung).done:
        last = (log.read_text().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{rung.name} failed (exit code {process.returncode}; all of it in {log}): {last}")


def _write(path: Path, rungs: Sequence[Rung], losses: Sequence[float]) -> None:
    finite = [
        (r.params, r.tokens, loss, r.flops)
        for r, loss in zip(rungs, losses, strict=True)
        if math.isfinite(loss)
    ]
    write_points(path, Points(*np.array(finite, dtype=np.float64).reshape(-1, 4).T))
