"""A device without memory: what is said of it."""

import re
import socket
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from parallel.layout import resolve_layout
from parallel.processes import WorkerPool
from parallel.torch_engine import TorchEngine
from tests.train.running import train_here
from train.config_file import load_config
from train.faults.memory import OutOfMemory, what_helps, what_helps_build
from train.resolve import resolve


def train_out_of_memory(config: str, overrides: list[str]) -> str:
    """A run whose third backward finds no memory: how that is told."""
    forward_backward = TorchEngine.forward_backward

    def allocate(self: TorchEngine, batch: object, step: int) -> torch.Tensor:
        if step == 3:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory"
            )
        return forward_backward(self, batch, step)  # type: ignore[arg-type]

    with patch.object(TorchEngine, "forward_backward", allocate), pytest.raises(OutOfMemory) as told:
        train_here(config, overrides)
    return str(told.value)


def test_it_is_told_where_it_was_and_what_would_help(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    told = pools[2].run(train_out_of_memory, tiny_config, [f"run.dir={tmp_path}"])
    for rank, (what, _, *changes) in enumerate(text.splitlines() for text in told):
        assert f"rank {rank} on {socket.gethostname()} is out of memory in step 3, at a peak of " in what
        assert re.search(r"of \d+\.\d\d GiB: ", what), "how much it is depends on what the process did before"
        assert what.endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert [change.split()[0] for change in changes] == [
            "data.micro_batch_size=1",
            "activation_checkpoint.mode=selective",
            "parallel.dp_shard=4",
        ]


def build_out_of_memory(config: str, overrides: list[str]) -> str:
    """A run that finds no memory for its model: how that is told."""

    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory"
        )

    with patch.object(TorchEngine, "_lay_out", allocate), pytest.raises(OutOfMemory) as told:
        train_here(config, overrides)
    return str(told.value)


def test_it_is_told_while_the_model_is_built(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    for text in pools[2].run(build_out_of_memory, tiny_config, [f"run.dir={tmp_path}"]):
        what, _, *changes = text.splitlines()
        assert f"on {socket.gethostname()} is out of memory while the model is built, at a peak of " in what
        keys = [change.split()[0] for change in changes]
        assert keys == ["parallel.dp_shard=4", "parallel.cpu_offload=true:"]


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        (["data.micro_batch_size=8", "parallel.dp_shard=1"], 1),
        (["data.micro_batch_size=1", "activation_checkpoint.mode=selective"], 2),
        (["activation_checkpoint.mode=full", "parallel.dp_replicate=2", "parallel.dp_shard=2"], 4),
        (["parallel.engine=deepspeed", "activation_checkpoint.mode=every_nth"], 2),
        (["data.micro_batch_size=3", "data.global_batch_size=12", "parallel.tp=2"], 4),
    ],
)
def test_what_would_help_can_be_done(tiny_config: str, settings: list[str], processes: int) -> None:
    config = load_config(tiny_config, settings).config
    layout = resolve_layout(config.parallel, processes)
    changes = what_helps(config, layout)
    assert changes
    for change in changes + what_helps_build(config, layout):
        setting = change.partition(" (")[0].partition(": ")[0].split()
        world = 2 * processes if "twice as many" in change else processes
        changed = resolve(load_config(tiny_config, [*settings, *setting]), world_size=world)
        assert changed.config != config


def test_a_budget_is_to_be_lowered(tiny_config: str) -> None:
    auto = ["activation_checkpoint.mode=auto", "activation_checkpoint.memory_budget=20GB"]
    config = load_config(tiny_config, [*auto, "data.micro_batch_size=1"]).config
    first = what_helps(config, resolve_layout(config.parallel, 1))[0]
    assert re.match(r"activation_checkpoint\.memory_budget=\d+ lowered", first)
