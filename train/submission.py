"""From a configuration to jobs on a cluster: all that can be checked is, before anything is submitted."""

import itertools
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from parallel.planner.estimate import fits
from parallel.planner.hardware import load_device
from slurm.commands import have_cluster, queue
from slurm.submit import check, next_submission, submissions, submit
from slurm.template import Job, render
from train import run_folder
from train.config import Config
from train.config_file import CONFIGS, Loaded, load_config
from train.errors import ConfigError
from train.plan import memory_of
from train.resolve import Plan, resolve

_PROJECT = CONFIGS.parent


@dataclass(frozen=True)
class Prepared:
    """A job that can be submitted."""

    job: Job
    runs: Mapping[Path, Config]
    """By their folders; of an array, in the order of its numbers."""

    @property
    def config(self) -> Config:
        """Of the first run; the others have the same `slurm` section."""
        return next(iter(self.runs.values()))


def prepare(
    config: str, overrides: Sequence[str], profiles: Sequence[str] = (), sweep: Sequence[str] = ()
) -> Prepared:
    """Check a run on as many processes as its `slurm` section says; with a sweep, one of each combination.

    sweep: `key.path=value,value,...`; the runs are named after their numbers.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake.
    """
    if not sweep:
        return prepare_runs([load_config(config, overrides, profiles)])
    name = load_config(config, overrides, profiles).config.run.name
    runs = [
        load_config(config, [*overrides, *point, f"run.name={name}-{number}"], profiles)
        for number, point in enumerate(_combinations(sweep))
    ]
    return prepare_runs(runs, array=name)


def prepare_runs(loaded: Sequence[Loaded], *, array: str | None = None) -> Prepared:
    """Check runs on as many processes as their `slurm` section says: one, or those of an array of a name.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake.
    """
    first = loaded[0].config
    runs = {}
    for each in loaded:
        if each.config.slurm != first.slurm:
            raise ConfigError(
                "--array: the runs of an array have one `slurm` section: leave it out of the sweep"
            )
        plan = resolve(each, first.slurm.world_size)
        folder = run_folder.folder_of(plan.config)
        run_folder.check_same_run(folder, plan)
        _check_memory(plan)
        runs[folder.path.absolute()] = each.config
    job = Job(
        name=array or first.run.name,
        folders=[*runs],
        working_folder=Path.cwd(),
        config=f"{next_submission([*runs])}/config.yaml",
        python=sys.executable,
        train=("-m", "train"),
        check=("-m", "train.node"),
        grace_seconds=ceil(first.run.grace_time),
        array=array is not None,
    )
    return Prepared(job, runs)


def _check_memory(plan: Plan) -> None:
    """Raises ConfigError where GPUs of the kind that `slurm.gpu` names have too little memory."""
    name = plan.config.slurm.gpu
    if name is None:
        return
    device = load_device(name)
    try:
        memory = memory_of(plan.config, plan.layout, device)
    except ConfigError as error:  # all that isn't fit to run has been refused before
        print(f"slurm.gpu={name}: memory is not predicted: {error}", file=sys.stderr)
        return
    if not fits(memory, device):
        raise ConfigError(
            f"{plan.config.run.name} would need {memory.total / 1e9:.1f} GB ({memory.in_gb}) of the "
            f"{device.memory_bytes / 1e9:.1f} of slurm.gpu={name}: `trireme plan CONFIG --gpus "
            f"{plan.layout.world_size} --gpu {name}` shows layouts that fit"
        )


def show(prepared: Prepared) -> None:
    """Print the script; where there is a cluster, ask whether it would take it.

    Raises:
        SlurmError: it wouldn't.
    """
    script = render(prepared.job, prepared.config.slurm)
    print(script)
    if have_cluster():
        check(script)


def hand_in(prepared: Prepared, chain: int, command: Sequence[str]) -> list[str]:
    """Submit. Returns the jobs' numbers.

    Raises:
        SlurmError: the cluster refuses it.
        ConfigError: a job of one of these runs waits or runs already.
    """
    for run, job in at_work(prepared.runs).items():
        raise ConfigError(
            f"{run} has a job already ({job}), and two would train it at once: `trireme cancel {run}` ends "
            f"it; --chain submits several that wait for each other"
        )
    configs = {run: run_folder.to_yaml(config) for run, config in prepared.runs.items()}
    return submit(prepared.job, prepared.config.slurm, configs, chain, command, _PROJECT)


def at_work(runs: Iterable[Path]) -> dict[Path, str]:
    """Those of some runs that have a job that waits or runs, with its number."""
    active = {each.job for each in queue() if each.active}
    return {
        run: job
        for run in runs
        for submission in submissions(run)
        for job in submission.jobs
        if job in active
    }


def _combinations(sweep: Iterable[str]) -> list[list[str]]:
    """`a=1,2` and `b=3,4` -> [a=1, b=3], [a=1, b=4], [a=2, b=3], [a=2, b=4]."""
    axes = []
    for given in sweep:
        key, equals, values = given.partition("=")
        if not equals or not all(values.split(",")):
            raise ConfigError(
                f"--array {shlex.quote(given)} is not of the form key.path=value,value, such as optimizer.lr=1e-3,3e-4"
            )
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]
