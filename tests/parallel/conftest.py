"""What a report of these tests says of the machine."""

import os
import platform
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.conftest import PersistentPools


@pytest.fixture(scope="package", autouse=True)
def _own_pools(pools: PersistentPools) -> Iterator[None]:
    """Layouts leave groups behind, whose threads never quite sleep: tests that come later get new processes."""
    yield
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session", autouse=True)
def machine(record_testsuite_property: Callable[[str, object], None]) -> None:
    """`tests.parallel.proved` puts it beside its table, with the load of what else ran when the tests began."""
    python, load = platform.python_version(), os.getloadavg()[0]
    record_testsuite_property(
        "machine",
        f"{os.cpu_count()} cores (load {load:.0f} before), torch {torch.__version__}, Python {python}",
    )
