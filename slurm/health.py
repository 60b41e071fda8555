"""What a node shows before work begins on it. Light to import; only the collective needs torch."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slurm.config import HealthConfig

_GB = 1e9


def write_report(folder: Path, report: str) -> None:
    """Write what is known of this node into a file of its name, at once."""
    aside = folder / f".{node_name()}"
    aside.write_text(f"{report}\n")
    aside.replace(folder / node_name())


def node_name() -> str:
    """What Slurm calls this node."""
    return os.environ["SLURMD_NODENAME"]


def find_faults(run: Path, config: HealthConfig, gpus: int) -> Iterator[str]:
    """What is wrong with this node by itself, as clauses."""
    for path in (run, Path(tempfile.gettempdir())):
        if shutil.disk_usage(path).free < config.free_disk_gb * _GB:
            yield f"less than {config.free_disk_gb:g} GB free in {path}"
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < config.free_shared_memory_gb * _GB:
        yield f"less than {config.free_shared_memory_gb:g} GB free in {shared}"
    if gpus:
        yield from _gpu_faults(gpus, config.used_gpu_memory_gb)
    if config.command is not None:
        done = subprocess.run(["bash", "-c", config.command], capture_output=True, text=True)
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[-200:]
            yield f"slurm.health.command failed with {done.returncode}{said and ': '}{said}"


def _gpu_faults(wanted: int, used_gb: float) -> Iterator[str]:
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi: {error}"
        return
    if done.returncode:
        yield f"nvidia-smi failed with {done.returncode}: {done.stdout.strip()[-200:]}"
        return
    rows = [[int(cell) for cell in line.split(",")] for line in done.stdout.splitlines()]
    if len(rows) < wanted:
        yield f"{len(rows)} GPU(s) instead of {wanted}"
    for index, used_mib in rows:
        if used_mib * 2**20 > used_gb * _GB:
            yield f"GPU {index} is not empty: {used_mib} MiB in use"
