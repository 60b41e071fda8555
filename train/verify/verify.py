"""A run in one process, then at every layout."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from parallel.config import Precision
from parallel.errors import LayoutError
from parallel.processes import WorkerPools
from train.verify.arrangements import Arrangement
from train.verify.plan import Plan
from train.verify.trial import INITIAL, Experiment, run_reference, try_arrangement
from train.verify.verdict import Finding, judge


def verify_plan(plan: Plan, precision: Precision, steps: int) -> Iterator[Finding]:
    """What is found of each arrangement, as it is found, with processes and a folder of its own."""
    with TemporaryDirectory(prefix="trireme-verify-") as folder, WorkerPools() as pools:
        experiment = Experiment(
            plan.model, plan.optimizer, precision, plan.seed, steps, plan.global_batch_size, Path(folder)
        )
        yield from verify(experiment, plan.arrangements, pools)


def verify(
    experiment: Experiment, arrangements: Iterable[tuple[str, Arrangement]], pools: WorkerPools
) -> Iterator[Finding]:
    """What is found of each arrangement, by its name, as it is found."""
    expected = run_reference(experiment)
    weights = frozenset(load_file(experiment.folder / INITIAL))
    order = [experiment.batches.order(step).tolist() for step in range(experiment.steps)]
    for name, arrangement in arrangements:
        try:
            arrangement.check(experiment.model, experiment.precision, experiment.global_batch_size)
            ranks = arrangement.layout.world_size
        except LayoutError as error:
            yield Finding(name, refused=str(error))
            continue
        try:
            trials = pools[ranks].run(try_arrangement, experiment, arrangement, expected)
        except RuntimeError as error:
            yield Finding(name, error=str(error))
            continue
        refusals = [trial for trial in trials if isinstance(trial, str)]
        yield Finding(name, refused=refusals[0]) if refusals else judge(name, trials, weights, order)
