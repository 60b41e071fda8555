"""Streaming is imported without what takes most of the time, which others can import all the same."""

import subprocess
import sys

CODE = """
import sys
import data.sequences
print(*({"transformers", "sklearn", "pandas", "torchvision"} & sys.modules.keys()))
from benchmarks.shims import let_transformers_import
let_transformers_import()
import streaming.text
from transformers.tokenization_utils_base import BatchEncoding
assert issubclass(streaming.text.StreamingC4, streaming.StreamingDataset)
assert BatchEncoding({"tokens": [1]}).tokens is not None
"""


def test_only_what_is_needed_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
