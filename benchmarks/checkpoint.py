"""How long the loop stands still for a save, in the background and without, and how fast it is written.

python -m benchmarks.checkpoint [MILLIONS OF PARAMETERS]

The state is of weights and Adam's two moments in fp32, in one process. Each round saves once while the loop waits, once
in the background beside a second of matrix products, which stand for the next step's forward and backward, once in the
background with the update right after, and writes as many bytes as a plain file, which is the disk's own rate. Ratios
are within a round, their median over the rounds.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from parallel.processes import process_group
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig
from train.saver import Saver

WIDTH, WARM_UP, ROUNDS = 1024, 1, 5
STEP_SECONDS = 1.0
"""Of a forward and a backward; one of 100 M parameters takes longer on a processor."""


def main(millions: int) -> None:
    """Print the medians."""
    rows = millions * 10**6 // WIDTH
    names = (f"{kind}.{index}" for kind in ("weight", "exp_avg", "exp_avg_sq") for index in range(8))
    state = {name: torch.randn(rows // 8, WIDTH) for name in names}
    with process_group(torch.device("cpu")), tempfile.TemporaryDirectory(dir=".") as folder:
        savers = {
            kind: _saver(Path(folder) / kind, kind == "background") for kind in ("waiting", "background")
        }
        rounds = [_round(savers, state, Path(folder), step) for step in range(WARM_UP + ROUNDS)][WARM_UP:]
        for saver in savers.values():
            saver.close()
    median = {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    stall, copy = (
        statistics.median(taken[name] / taken["waiting"] for taken in rounds) for name in ("stall", "copy")
    )
    rate = statistics.median(taken["plain file"] / taken["waiting"] for taken in rounds)
    print(f"{millions} M parameters, {size:,.0f} MB")
    for name, seconds in median.items():
        print(f"{name:>12} {seconds:7.2f} s  {size / seconds:7,.0f} MB/s")
    print(
        f"the loop stands still for {stall:.1%} of a save that it waits for ({copy:.0%} if it had nothing to do)"
    )
    print(f"a save that it waits for is written at {rate:.0%} of a plain file's rate")


def _saver(folder: Path, background: bool) -> Saver:
    return Saver(folder, CheckpointConfig(asynchronous=background, keep=1), {})


def _round(savers: dict[str, Saver], state: dict[str, Tensor], folder: Path, step: int) -> dict[str, float]:
    progress = Progress(step, 0, {})
    waiting = _seconds(lambda: savers["waiting"].save(state, progress))
    saver = savers["background"]
    stall = _seconds(lambda: saver.save(state, progress))
    beside = _seconds(_compute)
    stall += _seconds(saver.wait_for_copy)
    rest = _seconds(saver.wait)
    copy = _seconds(lambda: saver.save(state, progress)) + _seconds(saver.wait_for_copy)
    saver.wait()
    (folder / "plain").unlink(
        missing_ok=True
    )  # whose memory is then at hand: a machine may be slow to find some
    plain = _seconds(lambda: _write(folder / "plain", state))
    return {
        "waiting": waiting,
        "stall": stall,
        "copy": copy,
        "background": stall + beside + rest,
        "plain file": plain,
    }


def _compute() -> None:
    """What doesn't change the state."""
    began, x = time.perf_counter(), torch.randn(512, 512)
    while time.perf_counter() - began < STEP_SECONDS:
        torch.mm(x, x)


def _write(file: Path, state: dict[str, Tensor]) -> None:
    with file.open("wb") as stream:
        for tensor in state.values():
            stream.write(tensor.numpy().data.cast("B"))
        stream.flush()
        os.fsync(stream.fileno())


def _seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
