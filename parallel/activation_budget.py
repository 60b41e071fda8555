"""As little recomputation as a budget of memory allows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import get_args

import torch.distributed as dist

from parallel.activation_checkpoint import Recompute
from parallel.activation_memory import KeptBytes
from parallel.fit import too_small
from parallel.sizes import format_bytes


def choose(kept: KeptBytes, budget: int) -> dict[str, Recompute]:
    """What each layer recomputes, so that together they keep no more than the budget in bytes.

    As few layers as can be recompute all, which takes as long as their forward, and then as few as can be recompute
    selectively. Early layers come first: their turn is when what later ones kept is free again.

    Raises:
        LayoutError: they keep more even if all recompute all.
    """
    smallest = total(kept, dict.fromkeys(kept, "full"))
    if smallest > budget:
        raise too_small(budget, smallest)
    chosen: dict[str, Recompute] = dict.fromkeys(kept, "selective")
    _change(chosen, kept, kept, "full", budget)
    lighter = [name for name in kept if chosen[name] == "selective"]
    chosen |= dict.fromkeys(lighter, "none")
    _change(chosen, kept, lighter, "selective", budget)
    return chosen


def _change(
    chosen: dict[str, Recompute], kept: KeptBytes, names: Iterable[str], to: Recompute, budget: int
) -> None:
    """Have as few of these layers as can be do otherwise, those first that then keep the least in comparison."""
    excess = total(kept, chosen) - budget
    for name in sorted(names, key=lambda name: kept[name][to] - kept[name][chosen[name]]):
        if excess <= 0:
            return
        excess -= kept[name][chosen[name]] - kept[name][to]
        chosen[name] = to


def total(kept: KeptBytes, chosen: dict[str, Recompute]) -> int:
    """Bytes that layers keep if they recompute so."""
    return sum(kept[name][how] for name, how in chosen.items())


@dataclass(frozen=True)
class Budgeted:
    """What a budget comes to."""

    chosen: Mapping[str, Recompute]
    """Of all layers of the model, by their names."""
    kept: int
    """Bytes that the rank with the most keeps of a micro-batch."""

    def recompute(self, name: str) -> Recompute:
        """What a layer recomputes."""
        return self.chosen[name]

    def __str__(self) -> str:
        """`blocks.0-3 full, blocks.4-11 none; 1.2GB kept of a micro-batch`."""
        parts = ((name.rpartition("."), how) for name, how in self.chosen.items())
        places = sorted((stack, int(number), how) for (stack, _, number), how in parts)
        runs = []
        for (stack, how), run in groupby(places, lambda place: (place[0], place[2])):
            numbers = [number for _, number, _ in run]
            span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
            runs.append(f"{stack}.{span} {how}")
        return f"{', '.join(runs)}; {format_bytes(self.kept)} kept of a micro-batch"


def budgeted(kept: KeptBytes, budget: int) -> Budgeted:
    """What the layers of all ranks recompute; called by all together, each with what its own layers keep.

    Ranks that have the same layers choose alike, by what the one with most to keep keeps.

    Raises:
        LayoutError: on all ranks, where one of them can't keep to the budget.
    """
    everyones: list[KeptBytes] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, kept)
    sharing: dict[tuple[str, ...], list[KeptBytes]] = {}
    for theirs in everyones:
        sharing.setdefault(tuple(theirs), []).append(theirs)
    chosen: dict[str, Recompute] = {}
    most = 0
    for ranks in sharing.values():
        of_all = _largest(ranks)
        theirs_chosen = choose(of_all, budget)
        most = max(most, total(of_all, theirs_chosen))
        chosen |= theirs_chosen
    return Budgeted(chosen, most)


def _largest(ranks: Sequence[KeptBytes]) -> KeptBytes:
    """What the one of these ranks keeps that keeps most, as their shares of the work may differ."""
    return {
        name: {how: max(kept[name][how] for kept in ranks) for how in get_args(Recompute)}
        for name in ranks[0]
    }
