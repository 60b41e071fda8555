"""What the tests of several rooms share: pools of worker processes, and a small data set."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # layouts are proved on CPUs, wherever that is

from parallel.fit import ALL_WORKS, torch_version
from parallel.processes import WorkerEnded, WorkerPool, WorkerPools

# how long an example takes is the machine's affair
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: of what runs side by side, none that takes long begins when others are done.

    What an older torch can't do, and is refused there, is skipped by name.
    """
    if torch_version() < ALL_WORKS:
        for item in items:
            if "zero_bubble" in item.name or item.path.name == "test_async_tp.py":
                item.add_marker(pytest.mark.skip(reason=f"needs torch {ALL_WORKS}"))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


class Persistent:
    """A pool that makes a call once more, with new processes, where one of them ended in the midst of it.

    About once in several hundred runs of four loaded processes a thread of gloo's own crashes (SIGSEGV, SIGABRT). What
    a call returns, and any error that it raises, is taken the first time.
    """

    def __init__(self, pools: WorkerPools, size: int) -> None:
        self.pools, self.size = pools, size

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `WorkerPool.run`."""
        try:
            return self._pool.run(function, *args)
        except WorkerEnded as ended:
            warnings.warn(f"{ended}, in {function.__name__}: called again", stacklevel=2)
            return self._pool.run(function, *args)

    @property
    def _pool(self) -> WorkerPool:
        return WorkerPools.__getitem__(self.pools, self.size)


class PersistentPools(WorkerPools):
    """Pools by their size."""

    def __getitem__(self, size: int) -> Persistent:  # type: ignore[override]
        return Persistent(self, size)


@pytest.fixture(scope="session")
def pools() -> Iterator[PersistentPools]:
    """Pools of gloo processes by their size, started when first asked for."""
    with PersistentPools() as started:
        yield started


SENTENCES = (
    "The trireme was a warship with three banks of oars.",
    "Its crew of two hundred pulled in step to the piper's tune.",
    "A bronze ram at the prow broke the hulls of its enemies.",
    "Built of fir and pine, it was light enough to be drawn ashore at night.",
    "Athens kept three hundred of them in the harbours of Piraeus.",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [SENTENCES[(number * k + k) % len(SENTENCES)] for k in range(1, 30)]
        (folder / f"{number:02d}.txt").write_text(f"Chapter {number}\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, prepared: 300 tokens of vocabulary, sequences of 32."""
    from data.prepare import prepare

    out = tmp_path_factory.mktemp("dataset") / "small"
    prepare([str(corpus)], out, vocab_size=300, seq_len=32, validation_fraction=0.2, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_config(dataset: Path) -> str:
    """A configuration file of a very small model on the small data set."""
    path = dataset.parent / "tiny_test.yaml"
    path.write_text(
        f"""
run: {{steps: 6}}
model:
  d_model: 32
  num_layers: 2
  max_seq_len: 32
  vocab_size_multiple: 8
  attention: {{num_heads: 4, num_kv_heads: 2}}
  ffn: {{d_ff: 64}}
data: {{path: {dataset}, micro_batch_size: 2, global_batch_size: 8, num_workers: 0}}
optimizer: {{lr: 1.0e-2}}
schedule: {{type: constant, warmup_steps: 2}}
"""
    )
    return str(path)
