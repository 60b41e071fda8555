"""A run in one process, then at every layout."""

from collections.abc import Iterable, Iterator

from safetensors.torch import load_file

from parallel.errors import LayoutError
from parallel.processes import WorkerPools
from train.verify.arrangements import Arrangement
from train.verify.trial import INITIAL, Experiment, run_reference, try_arrangement
from train.verify.verdict import Finding, judge


def verify(
    experiment: Experiment, arrangements: Iterable[tuple[str, Arrangement]], pools: WorkerPools
) -> Iterator[Finding]:
    """What is found of each arrangement, by its name, as it is found."""
    expected = run_reference(experiment)
    weights = frozenset(load_file(experiment.folder / INITIAL))
    order = [experiment.batches.order(step).tolist() for step in range(experiment.steps)]
    for name, arrangement in arrangements:
        try:
            arrangement.check(experiment.model, experiment.global_batch_size)
            ranks = arrangement.layout.world_size
        except LayoutError as error:
            yield Finding(name, refused=str(error))
            continue
        try:
            trials = pools[ranks].run(try_arrangement, experiment, arrangement, expected)
        except RuntimeError as error:
            del pools[ranks]  # it is closed
            yield Finding(name, error=str(error))
            continue
        refusals = [trial for trial in trials if isinstance(trial, str)]
        yield Finding(name, refused=refusals[0]) if refusals else judge(name, trials, weights, order)
