"""Starting the processes of a run on this machine."""

import os
import sys
from collections.abc import Sequence

from data.dataset import SPLITS
from data.shards import check
from data.shared_memory import clean_stale_shared_memory
from train import checkpoint_folder, run_folder
from train.config_file import load_config
from train.resolve import resolve


def launch(config: str, overrides: Sequence[str]) -> None:
    """Check everything; then train in this process, or replace it by torchrun where the layout needs several.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake, before any process is started.
    """
    loaded = load_config(config, overrides)
    plan = resolve(loaded)
    folder = run_folder.folder_of(plan.config)
    run_folder.check_same_run(folder, plan)
    if plan.total_steps is not None and checkpoint_folder.newest_step(folder.checkpoints) >= plan.total_steps:
        print(f"{folder.path} is already done ({plan.total_steps} steps): raise run.steps to go on with it")
        return None
    if plan.config.data.on_bad_shard == "fail":
        check([source.info for source in plan.mixture], SPLITS)
    clean_stale_shared_memory()
    processes = plan.layout.world_size
    if processes == 1 or "RANK" in os.environ:
        from parallel.processes import end_process  # only now: torch takes seconds
        from train.worker import work

        work(loaded)
        end_process()
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "train", config, *overrides])
