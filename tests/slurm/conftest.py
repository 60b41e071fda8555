"""The cluster that the tests of this folder share."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import HOW_TO_GET_THEM, Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Eight nodes. Tests that need one and can't are skipped by name."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {HOW_TO_GET_THEM}")
    with Cluster(nodes=8) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        # what Slurm hands to jobs is the environment of these tests, without a launcher's ranks
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(["."]))
        yield started
