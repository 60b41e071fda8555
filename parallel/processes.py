"""Processes and their group: joining the launcher's, being one alone, or starting a pool of gloo workers."""

import faulthandler
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore, HashStore

from parallel.errors import LayoutError


def pick_device() -> torch.device:
    """This process's device: its GPU where there are any, else the CPU.

    Raises:
        LayoutError: more processes on this node than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"process {local_rank} of this node has no GPU of its own: there are {torch.cuda.device_count()}; "
            f"start at most that many per node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun or Slurm set up in the environment, or be a group of one."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def end_process(code: int = 0) -> NoReturn:
    """Leave with this exit code when all is done and closed.

    A process that had a gloo group at times aborts in the interpreter's ordinary exit, with `terminate called
    without an active exception`: a thread of the library's outlives what it belongs to. So that is not gone through.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank, agreed on the host: the device is not waited for."""
    agreed = torch.tensor(int(flag))
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return bool(agreed.item())


class WorkerEnded(RuntimeError):
    """A process of a pool is no more."""


class WorkerPool:
    """`size` gloo processes on this machine that run functions together, started once and reused.

    Use as a context manager. Functions and their arguments are pickled, so they must be importable.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        self.size = size
        self.closed = False
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="trireme-pool-")
        store = str(Path(self._folder.name) / "store")
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` in every process at once; the results by rank.

        Raises:
            RuntimeError: a call failed, with the traceback of the first that did; the pool is then closed.
            WorkerEnded: a process ended in the midst of it; likewise.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes: dict[int, Any] = {}
        while len(outcomes) < self.size:
            # in the order in which they come: others may wait for one that failed, for ever
            waited = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in outcomes}
            for rank in [waited[pipe] for pipe in wait(list(waited))]:  # type: ignore[index]
                try:
                    succeeded, value = self._pipes[rank].recv()
                except EOFError:
                    raise self._ended(rank) from None
                if not succeeded:
                    self.close()
                    raise RuntimeError(f"rank {rank} of {self.size} failed: {value}")
                outcomes[rank] = value
        return [outcomes[rank] for rank in range(self.size)]

    def _ended(self, rank: int) -> "WorkerEnded":
        self._processes[rank].join()
        code = self._processes[rank].exitcode
        assert code is not None
        self.close()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return WorkerEnded(f"rank {rank} of {self.size} ended {how}")

    def close(self) -> None:
        """End the processes."""
        self.closed = True
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class WorkerPools(dict[int, WorkerPool]):
    """Pools by their size, each started when it is first asked for, and anew after a failure. A context manager."""

    def __getitem__(self, size: int) -> WorkerPool:
        pool = self.get(size)
        if pool is None or pool.closed:
            pool = self[size] = WorkerPool(size)
        return pool

    def __enter__(self) -> "WorkerPools":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pool in self.values():
            pool.close()


def _serve(rank: int, size: int, store: str, threads: int, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    faulthandler.enable()
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size)
    while True:
        function, args = pipe.recv()
        try:
            outcome = (True, function(*args))
        except BaseException:  # noqa: BLE001 - whatever it was, the caller gets its traceback
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
