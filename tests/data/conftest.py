"""A small corpus, and a data set of many parts made of it."""

import random
from pathlib import Path
from typing import Any

import pytest

from data.dataset import DatasetInfo, tokenizer_path
from data.prepare import prepare

OPTIONS: dict[str, Any] = {"vocab_size": 320, "seq_len": 16, "validation_fraction": 0.2, "part_bytes": 4_000}
"""Of `prepared`, which thus has about ten parts."""


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 text files, of 20 to 1500 bytes."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = [
        "oar",
        "bronze",
        "ram",
        "pine",
        "fir",
        "hull",
        "é",
        "船",
        "deck",
        "sail",
        "keel",
        "stern",
        "Athens\n",
        "two",
        "",
        "three",
    ]
    for i in range(60):
        count = draw.randint(5, 300)
        text = " ".join(draw.choice(words) for _ in range(count))
        path = folder / f"{i % 7}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, newline="")
    return folder


@pytest.fixture(scope="session")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """A finished data set of `texts`."""
    return prepare([str(texts)], tmp_path_factory.mktemp("prepared") / "set", workers=1, **OPTIONS).dataset


@pytest.fixture(scope="session")
def prepared_too(prepared: DatasetInfo, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """Another, a tenth of the size, in the same tokens."""
    folder = tmp_path_factory.mktemp("more")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"row {i} of the fleet, " * (2 + i % 5))
    out = tmp_path_factory.mktemp("prepared_too") / "set"
    options = OPTIONS | {"tokenizer": tokenizer_path(prepared.path)}
    return prepare([str(folder)], out, workers=1, **options).dataset
