"""What the tests of several rooms share: pools of worker processes, and a small data set."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from parallel.processes import WorkerPool, WorkerPools


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, WorkerPool]]:
    """Pools of 1, 2 and 4 gloo processes, started when first asked for."""
    with WorkerPools() as started:
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
