"""What to say when a device has no memory left: where it was, how much was held, and what would help."""

import socket

import torch
import torch.distributed as dist

from parallel.config import RecomputeMode
from parallel.layout import Layout
from train.config import Config
from train.metrics import peak_memory_bytes

LESS_KEPT: dict[RecomputeMode, RecomputeMode] = {
    "none": "selective",
    "selective": "full",
    "every_nth": "full",
}
"""The mode of recomputation that keeps less."""


class OutOfMemory(Exception):
    """This rank's device has no memory left. The message is a few lines: what happened, and what would help."""


def out_of_memory(
    error: torch.OutOfMemoryError,
    config: Config,
    layout: Layout,
    device: torch.device,
    step: int | None = None,
) -> OutOfMemory:
    """The error as it is told; step: the one under way, None while the model is built."""
    where = "while the model is built" if step is None else f"in step {step}"
    what = (
        f"rank {dist.get_rank()} on {socket.gethostname()} is out of memory {where}, "
        f"at a peak of {peak_memory_bytes(device) / 2**30:.2f} GiB: {str(error).splitlines()[0]}"
    )
    changes = what_helps_build(config, layout) if step is None else what_helps(config, layout)
    helps = "".join(f"\n  {change}" for change in changes)
    return OutOfMemory(f"{what}\nwhat would help, and changes the run by no more than rounding:{helps}")


def what_helps(config: Config, layout: Layout) -> list[str]:
    """Changes of the configuration that need less memory, the cheapest first."""
    micro, recompute = config.data.micro_batch_size, config.activation_checkpoint
    changes = []
    if micro > 1:
        smaller = max(size for size in range(1, micro) if micro % size == 0)
        changes.append(f"data.micro_batch_size={smaller} (now {micro}): less is kept for the backward")
    if recompute.mode == "auto":
        changes.append(
            f"activation_checkpoint.memory_budget={recompute.memory_budget} lowered: blocks keep less for the backward"
        )
    elif recompute.mode != "full":
        changes.append(
            f"activation_checkpoint.mode={LESS_KEPT[recompute.mode]} (now {recompute.mode}): less is kept, more is "
            f"computed again"
        )
    return changes + _more_shards(config, layout)


def what_helps_build(config: Config, layout: Layout) -> list[str]:
    """Changes that need less memory for weights and optimizer state, the cheapest first."""
    changes = _more_shards(config, layout)
    if config.parallel.engine == "torch" and not config.parallel.cpu_offload:
        changes.append("parallel.cpu_offload=true: weights and optimizer state are in the host's memory")
    return changes


def _more_shards(config: Config, layout: Layout) -> list[str]:
    if config.parallel.engine == "deepspeed" and (stage := config.parallel.deepspeed.stage) < 3:
        return [f"parallel.deepspeed.stage=3 (now {stage}): ranks share gradients and weights out, too"]
    if layout.dp_replicate > 1:
        shards = f"parallel.dp_replicate=1 parallel.dp_shard={layout.data_size}"
        return [f"{shards}: each rank holds a smaller share of weights and optimizer state"]
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    fitting = [size for size in range(1, micro + 1) if whole % (size * 2 * layout.data_size) == 0]
    if not fitting:
        return []
    smaller = f" data.micro_batch_size={fitting[-1]}" if fitting[-1] < micro else ""
    return [
        f"parallel.dp_shard={2 * layout.dp_shard}{smaller} (now {layout.dp_shard}), on twice as many processes: each "
        f"holds half the share of weights and optimizer state"
    ]
