"""What makes a node a sick one, each fault planted."""

from pathlib import Path
from unittest.mock import patch

import pytest

from parallel.processes import WorkerPool
from slurm.config import HealthConfig
from slurm.fabric import rounds
from slurm.health import find_faults, write_report

EASY = {"free_disk_gb": 0, "free_shared_memory_gb": 0}


def faults(folder: Path, gpus: int = 0, **settings: object) -> str:
    """What is wrong with this machine."""
    return "; ".join(find_faults(folder, HealthConfig.model_validate(EASY | settings), gpus))


def test_a_healthy_node_has_no_faults(tmp_path: Path) -> None:
    assert faults(tmp_path, command="true") == ""


def test_faults_are_named(tmp_path: Path) -> None:
    assert f"less than 1e+09 GB free in {tmp_path}" in faults(tmp_path, free_disk_gb=1e9)
    assert "GB free in /dev/shm" in faults(tmp_path, free_shared_memory_gb=1e9)
    assert faults(tmp_path, command="echo fan broken; exit 3") == (
        "slurm.health.command failed with 3: fan broken"
    )


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("echo '0, 4'; echo '1, 0'", ""),
        ("echo '0, 4'", "1 GPU(s) instead of 2"),
        ("echo '0, 4'; echo '1, 40000'", "GPU 1 is not empty: 40000 MiB in use"),
        ("echo driver gone; exit 9", "nvidia-smi failed with 9: driver gone"),
    ],
)
def test_gpus_are_there_and_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, expected: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert faults(tmp_path, gpus=2) == expected


def test_no_nvidia_smi_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi" in faults(tmp_path, gpus=1)


def test_a_report_is_there_at_once_and_under_the_nodes_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    write_report(tmp_path, "ok")
    assert [path.name for path in tmp_path.iterdir()] == ["n7"]
    assert (tmp_path / "n7").read_text() == "ok\n"


def meet_off_by(seconds: list[float]) -> dict[str, float]:
    """In a pool's worker, whose clock is off by its rank's seconds: who is found to be."""
    import time

    import torch.distributed as dist

    from slurm import fabric

    rank, real = dist.get_rank(), time.time
    fabric.time.time = lambda: real() + seconds[rank]  # type: ignore[assignment]
    try:
        return fabric.skewed(f"n{rank}", 2.0)
    finally:
        fabric.time.time = real


def test_a_clock_that_is_off_is_found(pools: dict[int, WorkerPool]) -> None:
    (off,) = {tuple(found) for found in pools[4].run(meet_off_by, [0.0, 0.1, -30.0, 0.0])}
    assert off == ("n2",)


def meet_slowly(slow: int) -> float:
    """In a pool's worker: the bandwidth to its better neighbour, where a rank's exchanges take a while."""
    import time

    import torch
    import torch.distributed as dist

    from slurm import fabric

    exchange = fabric._exchange

    def slowed(operations: list[dist.P2POp]) -> None:
        if dist.get_rank() == slow:
            time.sleep(0.5)
        exchange(operations)

    with patch.object(fabric, "_exchange", slowed):
        return fabric.to_neighbour(torch.device("cpu"))


@pytest.mark.slow
def test_of_neighbours_the_slow_one_is_found(pools: dict[int, WorkerPool]) -> None:
    """Its neighbours wait for it, but each has another."""
    found = pools[4].run(meet_slowly, 2)
    assert found[2] < 2**24 / 0.5 < min(found[:2] + found[3:])


@pytest.mark.parametrize("size", range(1, 9))
def test_neighbours_in_a_ring_exchange_in_turn(size: int) -> None:
    met = rounds(size)
    for pairs in met:
        assert all(pairs[other] == rank for rank, other in pairs.items())
    partners = [{pairs[rank] for pairs in met if rank in pairs} for rank in range(size)]
    assert partners == [{(rank - 1) % size, (rank + 1) % size} - {rank} for rank in range(size)]
