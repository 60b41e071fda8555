"""What ranks do in the course of a step, from the seconds that it is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.planner.actions import Action, Work, actions_of
from parallel.planner.estimate import Estimate
from parallel.planner.facts import Arrangement
from parallel.planner.step_time import AtWork, StepTime, at_work, step_time_of_place

What = Literal["forward", "backward", "communication", "optimizer"]

SHARES: dict[Work, float] = {"F": 1.0, "B": 1.0, "I": 0.5, "W": 0.5}
"""Of a forward or a backward."""


@dataclass(frozen=True)
class Span:
    """One thing that one rank does."""

    place: int
    """Of the rank in the pipeline."""
    start: float
    """Seconds."""
    seconds: float
    what: What
    micro_batch: int | None = None

    @property
    def stop(self) -> float:
        """Seconds."""
        return self.start + self.seconds


def timeline(found: Estimate) -> list[Span]:
    """A step of each rank of a pipeline, or of one rank where there is none; when nothing is said, it waits."""
    run, arrangement, device = found.run, found.arrangement, found.device
    places = range(arrangement.layout.pp)
    works = [at_work(run, arrangement, place, device) for place in places]
    times = [step_time_of_place(run, arrangement, place, device) for place in places]
    spans = list(_passes(arrangement, arrangement.micro_batches(run), works))
    ends = {place: max(span.stop for span in spans if span.place == place) for place in places}
    for place, time in enumerate(times):
        spans.append(Span(place, ends[place], time.dp + time.host, "communication"))
    # all wait for the norm of the gradients
    together = max(span.stop for span in spans)
    spans += [Span(place, together, time.optimizer, "optimizer") for place, time in enumerate(times)]
    return [span for span in spans if span.seconds > 0]


def _passes(arrangement: Arrangement, count: int, works: list[AtWork]) -> Iterator[Span]:
    """Each rank does what is next when what it needs is there."""
    queues = {place: list(actions_of(arrangement, place, count)) for place in range(len(works))}
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * len(works)
    last = arrangement.parallel.num_stages - 1
    while any(queues.values()):
        before = len(done)
        for place, queue in queues.items():
            while queue and all(need in done for need in _needs(queue[0], last)):
                action = queue.pop(0)
                ready = max([free[place], *(done[need] for need in _needs(action, last))])
                spans = _of_action(action, place, ready, works[place], arrangement, count)
                yield from spans
                free[place] = spans[-1].stop
                done[action.work, action.stage, action.micro_batch] = free[place]
        assert len(done) > before, "every schedule comes to its end"


def _needs(action: Action, last: int) -> list[tuple[str, int, int]]:
    """What is to be done before."""
    work, stage, micro_batch = action.work, action.stage, action.micro_batch
    if work == "F":
        return [("F", stage - 1, micro_batch)] if stage else []
    if work == "W":
        return [("I", stage, micro_batch)]
    return [("F", stage, micro_batch) if stage == last else (work, stage + 1, micro_batch)]


def _of_action(
    action: Action, place: int, start: float, work: AtWork, arrangement: Arrangement, count: int
) -> list[Span]:
    stages = arrangement.parallel.num_stages // arrangement.layout.pp
    whole = work.forward if action.work == "F" else work.backward
    seconds = whole * SHARES[action.work] / (count * stages)
    sent = _communicated(work.time)
    what: What = "forward" if action.work == "F" else "backward"
    computed = Span(place, start, seconds * (1 - sent), what, action.micro_batch)
    return [computed, Span(place, computed.stop, seconds * sent, "communication", action.micro_batch)]


def _communicated(time: StepTime) -> float:
    """The share of passes in which nothing is computed beside communication."""
    sent = time.tp + time.cp + time.ep + time.pp
    return sent / (sent + time.compute + time.recompute + time.elementwise + time.launch)
