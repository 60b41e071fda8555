"""Training runs inside of pool workers, which have a process group already."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from train import run_folder
from train.config_file import load_config
from train.resolve import resolve
from train.run import run
from train.run_folder import RunFolder, read_metrics


def train_here(config: str, overrides: list[str]) -> int:
    """What `train.worker.work` does within the group. Returns the last step."""
    plan = resolve(load_config(config, overrides), world_size=dist.get_world_size())
    folder = run_folder.folder_of(plan.config)
    run_folder.check_same_run(folder, plan)
    dist.barrier()  # none looks at what the first one writes
    if dist.get_rank() == 0:
        run_folder.create(folder, plan)
    dist.barrier()
    torch.compiler.reset()  # the code compiled for other runs counts towards its limit
    return run(plan, torch.device("cpu"))


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every line of a run's metrics.jsonl."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(RunFolder(folder))]


def environment() -> dict[str, str]:
    """For commands in processes of their own: this environment, without a launcher's ranks."""
    dropped = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in dropped}
