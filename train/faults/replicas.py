"""Whether ranks that hold the same weights still do: what finds a device that corrupts data without a word."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import Engine
from parallel.gradients import local
from parallel.layout import SIZES, Layout

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""


def differing_ranks(engine: Engine) -> list[int]:
    """Those whose weights aren't the ones that most ranks have that hold the same; called by all ranks together.

    Where there is no majority, as among two, all of them.
    """
    own = _digests(engine)
    tables = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, own)
    everything, uncut = torch.stack(tables).T.tolist()
    return outliers(everything, uncut, engine.layout)


def _digests(engine: Engine) -> Tensor:
    """Of all weights of this rank, and of those that tensor-parallel ranks have alike; (2,) int64.

    They are sums of the elements' bits, modulo 2**64, which a change of a single element always changes.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=engine.device)
    for name, tensor in engine.weights().items():
        held = local(tensor).detach()
        digest = held.view(_BITS[held.element_size()]).sum(dtype=torch.int64).to(engine.device)
        cut = engine.cuts.get(name.removeprefix("model."))
        alike = cut is not None and cut.dim is None and not cut.expert
        sums += torch.stack((digest, digest * alike))
    return sums


def outliers(everything: list[int], uncut: list[int], layout: Layout) -> list[int]:
    """By digests of all ranks, which of them aren't what they should be; see `differing_ranks`."""
    ranks = torch.arange(layout.world_size).view([getattr(layout, name) for name in SIZES])
    stages, replicas, shards, parts, cuts = range(len(SIZES))
    same_place = ranks.permute(stages, shards, parts, cuts, replicas).flatten(0, 3)
    same_shard = ranks.permute(stages, shards, parts, replicas, cuts).flatten(0, 2).flatten(1)
    found = set[int]()
    for digests, groups in ((everything, same_place), (uncut, same_shard)):
        for group in groups.tolist():
            digest, count = Counter(digests[rank] for rank in group).most_common(1)[0]
            if count <= len(group) / 2:
                found |= set(group)
            found |= {rank for rank in group if digests[rank] != digest}
    return sorted(found)
