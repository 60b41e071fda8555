"""The `data` section says what is wrong with it and what would work."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from data.config import DataConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": 0}, "data.micro_batch_size=0: give a positive number"),
        ({"global_batch_size": -1}, "data.global_batch_size=-1: give a positive number"),
        ({"micro_batch_size": 5, "global_batch_size": 32}, "set data.global_batch_size=30"),
        ({"micro_batch_size": 64}, "set data.global_batch_size=64"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"batch": 1}, "Extra inputs"),
    ],
)
def test_what_does_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(path="x", **values)


def test_what_the_command_line_imports_is_light() -> None:
    code = "import sys, data.config, data.stream, data.errors, data.dataset; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "streaming", "sentencepiece", "pyarrow", "datasets"} & set(modules.stdout.split())
