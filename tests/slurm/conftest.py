"""The cluster that the tests of this folder share."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import HOW_TO_GET_THEM, Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(worker_id: str) -> Iterator[Cluster]:
    """Eight nodes, for each process that runs tests side by side. Tests that need one and can't are skipped by name."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {HOW_TO_GET_THEM}")
    first_job = 1 + 400 * int(worker_id.removeprefix("gw")) if worker_id != "master" else 1
    with Cluster(8, first_job) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        # what Slurm hands to jobs is the environment of these tests, without a launcher's ranks
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(["."]))
        yield started
