"""What one GPU computes, against the CPU. `make test-gpu` runs it where there is one."""

import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.train.running import losses
from tests.train.test_faults import tensors_of
from tests.train.test_stop import training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not `make test-gpu`")

WAYS: dict[str, tuple[list[str], float]] = {
    "fp32": ([], 1e-3),
    "compiled": (["compile.enabled=true"], 1e-3),
    "recomputed": (["activation_checkpoint.mode=selective"], 1e-3),
    "offloaded": (["parallel.cpu_offload=true"], 1e-3),
    "bf16": (["precision=bf16"], 0.05),
    "bf16 compiled": (["precision=bf16", "compile.enabled=true"], 0.05),
    "fp16": (["precision=fp16"], 0.05),
    "fp8": (["precision=fp8"], 0.1),
}
"""Settings, and how far losses may be from those of fp32 on a CPU, relatively."""

MODELS: dict[str, list[str]] = {
    "dense": [],
    "experts": ["model.moe.num_experts=4", "model.moe.d_ff=32"],
    "window": ["model.attention.mask_type=sliding_window", "model.attention.window_size=8"],
}


def train(config: str, folder: Path, *overrides: str, code: str = "") -> np.ndarray:
    """A run's steps, losses and gradient norms, (steps, 3)."""
    with training(config, folder, "run.steps=8", *overrides, code=code) as process:
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return np.array(losses(folder / "run"))


def on_cpu() -> "patch.dict":
    """In here runs see no GPU."""
    return patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_computes_the_run_of_the_cpu(tiny_config: str, tmp_path: Path, model: str, way: str) -> None:
    settings, bound = WAYS[way]
    if way == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no 8-bit floats")
    with on_cpu():
        expected = train(tiny_config, tmp_path / "cpu", *MODELS[model])
    computed = train(tiny_config, tmp_path / "gpu", *MODELS[model], *settings)
    assert computed == pytest.approx(expected, rel=bound)


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu_and_back(tiny_config: str, tmp_path: Path) -> None:
    whole = train(tiny_config, tmp_path / "whole")
    train(tiny_config, tmp_path, "run.steps=3")
    with on_cpu():
        train(tiny_config, tmp_path, "run.steps=6")
    assert train(tiny_config, tmp_path) == pytest.approx(whole, rel=1e-3)


LATE = """
import time
from train.host_copy import HostCopy
copy = HostCopy._copy
def late(self, shards):
    time.sleep(0.3)
    return copy(self, shards)
HostCopy._copy = late
"""


def test_saves_in_the_background_have_the_step_that_they_are_of(tiny_config: str, tmp_path: Path) -> None:
    """Though the loop has gone on when the copy begins."""
    settings = ["checkpoint.every_steps=2", "checkpoint.keep=9"]
    train(tiny_config, tmp_path / "waits", *settings)
    train(tiny_config, tmp_path / "goes_on", "checkpoint.asynchronous=true", *settings, code=LATE)
    for step in (2, 4, 6, 8):
        waited, went_on = (tensors_of(tmp_path / each / "run", step) for each in ("waits", "goes_on"))
        assert waited.keys() == went_on.keys()
        for name, tensor in waited.items():
            torch.testing.assert_close(went_on[name], tensor, rtol=1e-3, atol=1e-5)
