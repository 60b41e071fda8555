"""A process of a run, from its place in the group to its end."""

import logging

import torch.distributed as dist

from parallel.processes import pick_device, process_group
from train import run_folder
from train.config_file import Loaded
from train.resolve import resolve
from train.run import run


def work(loaded: Loaded) -> None:
    """Check, join the group, train. Every rank checks alike, so a user's mistake stops all of them.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake.
    """
    plan = resolve(loaded)
    folder = run_folder.folder_of(plan.config)
    run_folder.check_same_run(folder, plan)
    device = pick_device()
    with process_group(device):
        logging.basicConfig(
            level=logging.INFO if dist.get_rank() == 0 else logging.WARNING, format="%(message)s"
        )
        if dist.get_rank() == 0:
            run_folder.create(folder, plan)
        dist.barrier()
        run(plan, device)
        dist.barrier()
