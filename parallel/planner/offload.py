"""What a rank steps, and what of that goes between its device and the host's memory."""

from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.rank import Rank
from parallel.planner.zero import shard_of


def stepped(arrangement: Arrangement, rank: Rank) -> float:
    """Elements that a rank's optimizer steps."""
    if arrangement.parallel.engine == "deepspeed":
        return rank.all.computed if arrangement.parallel.deepspeed.stage == 0 else shard_of(arrangement, rank)
    return float(rank.all.stored)


def host_bytes(run: RunFacts, arrangement: Arrangement, rank: Rank) -> float:
    """Bytes of a step in either direction: FSDP2 copies its fp32 shards in whenever it gathers, and gradients out
    whenever it reduces; ZeRO sends gradients out and new weights in."""
    parallel, elements = arrangement.parallel, stepped(arrangement, rank)
    times = 1 if arrangement.layout.pp > 1 else arrangement.micro_batches(run)
    gathers = times * (1 if arrangement.keeps_gathered else 2)
    if parallel.engine == "torch":
        return (gathers + times) * elements * run.master_size if parallel.cpu_offload else 0.0
    zero, total = parallel.deepspeed, 0.0
    if zero.offload_optimizer != "none":
        # stage 3 adds up micro-batches there
        out = times if zero.stage == 3 else 1
        total += out * elements * run.master_size + elements * run.itemsize
    if zero.offload_param != "none":
        total += gathers * elements * run.itemsize
    return total
