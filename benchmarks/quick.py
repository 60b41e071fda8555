"""`make bench-quick`: tokens per second of our loop against a bare torch loop and against transformers' Llama.

All three train the same shape from the same weights on the same batches. Steps are taken in turn, and the ratio is
the median over the rounds, so that a drift of the machine's speed cancels out.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.llama import make_llama
from data.dataset import SplitInfo, TextInfo
from data.stream import Batch, TrainingStream
from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from parallel.layout import Layout
from parallel.processes import process_group
from train.config import Config, OptimizerConfig
from train.faults.health import Health
from train.metrics import Metrics
from train.monitor import Monitor
from train.order_digest import OrderDigest
from train.resolve import Plan
from train.run import engine_of
from train.samples import Sample
from train.trainer import Hooks, Trainer

BATCH, SEQ_LEN, VOCAB = 8, 256, 4096
WARM_UP, ROUNDS = 2, 9


def main() -> None:
    """Print the table."""
    table = Table("precision", "mode", "tokens/s", "of bare loop", "of transformers", "losses differ by")
    device = torch.device("cpu")
    with process_group(device):
        for precision in ("fp32", "bf16"):
            for compiled in (False, True):
                torch.compiler.reset()
                table.add_row(precision, "compiled" if compiled else "eager", *compare(precision, compiled))
    console = Console()
    console.print(f"{torch.get_num_threads()} threads, batch {BATCH} x {SEQ_LEN} tokens, {model_line()}")
    console.print(table)
    console.print(f"trireme --help: {help_seconds():.2f} s")


def config_of(precision: str, compiled: bool) -> Config:
    """The tiny preset's shape, two layers deep, so that compiling is quick."""
    return Config.model_validate(
        {
            "run": {"steps": 10_000},
            "model": {
                "vocab_size": VOCAB,
                "d_model": 256,
                "num_layers": 2,
                "max_seq_len": SEQ_LEN,
                "attention": {"variant": "mha", "num_heads": 4},
                "ffn": {"d_ff": 1024},
            },
            "data": {"path": "-", "micro_batch_size": BATCH, "global_batch_size": BATCH},
            "schedule": {"type": "constant"},
            "precision": precision,
            "compile": {"enabled": compiled},
        }
    )


def compare(precision: str, compiled: bool) -> tuple[str, str, str, str]:
    """One row: our tokens/s, its ratio to both others, and the largest relative difference of losses."""
    config = config_of(precision, compiled)
    assert isinstance(config.model, ModelConfig)
    theirs = BareLoop(config, make_llama(config.model))
    loops: list[OurLoop | BareLoop] = [OurLoop(config), BareLoop(config, our_model(config)), theirs]
    seconds: list[list[float]] = [[], [], []]
    for number in range(WARM_UP + ROUNDS):
        for loop, taken in zip(loops, seconds, strict=True):
            began = time.perf_counter()
            loop.step(number)
            if number >= WARM_UP:
                taken.append(time.perf_counter() - began)
    ours, *others = (loop.losses() for loop in loops)
    rate = BATCH * SEQ_LEN / statistics.median(seconds[0])
    ratios = [
        statistics.median(o / s for s, o in zip(seconds[0], other, strict=True)) for other in seconds[1:]
    ]
    difference = max(abs(a - b) / b for other in others for a, b in zip(ours, other, strict=True))
    return f"{rate:,.0f}", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}", f"{difference:.1e}"


def our_model(config: Config) -> nn.Module:
    """The model as a plain module, with the run's initial weights."""
    model = build_model(config.model)
    initialize(model, config.model, config.run.seed)
    return model


def batch_of(step: int) -> Batch:
    """Random tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1), generator=generator)
    inputs = {"tokens": tokens[:, :-1].contiguous()}
    return Batch(inputs, tokens[:, 1:].contiguous(), torch.arange(BATCH))


class RandomStream:
    """Stands in for the stream of shards, which is measured elsewhere."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __init__(self) -> None:
        self.step = 0
        self.skipped_sequences = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, as the trainer reads it."""
        return {"batches": self.step, "sequences": {}}

    def __next__(self) -> Batch:
        self.step += 1
        return batch_of(self.step - 1)


class Losses:
    """A listener that keeps the losses."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def step(self, metrics: Metrics) -> None:
        """Keep it."""
        self.all.append(metrics.loss)

    def sample(self, step: int, sample: Sample) -> None:
        """Not of interest."""

    def close(self) -> None:
        """Nothing is open."""


class OurLoop:
    """The trainer's own step, with engine, schedule, metrics and monitor."""

    def __init__(self, config: Config) -> None:
        empty = SplitInfo(documents=0, tokens=0, bytes=0, sequences=0)
        dataset = TextInfo(Path("-"), SEQ_LEN, VOCAB, 0, empty, empty, digest="", bos_id=2, eos_id=3)
        plan = Plan(config, {}, dataset, (), Layout(dp_replicate=1, dp_shard=1))
        self.listener = Losses()
        self.trainer = Trainer(
            plan,
            engine_of(plan, torch.device("cpu")),
            cast(TrainingStream, RandomStream()),
            Monitor([self.listener]),
            Hooks(
                save=lambda step, digest: None,
                before_update=lambda: None,
                evaluate=lambda: 0.0,
                sample=lambda step: None,
                record=lambda kind, step, sample_ids, **more: None,
                missed_saves=lambda: 0,
                saved=lambda: None,
                check=lambda: None,
                roll_back=lambda data: None,
                differing_ranks=list,
                slow_ranks=lambda data_seconds, step_seconds: {},
                step_ended=lambda step: None,
            ),
            OrderDigest(lambda total: total, torch.device("cpu")),
            Health(config.faults, {}),
            flops_per_token=1.0,
            peak_flops=1.0,
            start=0,
        )
        self.trainer.start_clock()

    def step(self, number: int) -> None:
        """One step of the trainer."""
        self.trainer.step = number + 1
        self.trainer.train_step()

    def losses(self) -> list[float]:
        """Of every step so far."""
        self.trainer.tell()
        return self.listener.all


class BareLoop:
    """What one writes by hand: forward, cross-entropy, backward, clip, AdamW; autocast for bf16."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.config, self.parameters = config, list(model.parameters())
        self.model = torch.compile(model) if config.compile.enabled else model
        self.optimizer = _adamw(model, config.optimizer)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
        self._losses: list[Tensor] = []

    def step(self, number: int) -> None:
        """One step."""
        batch = batch_of(number)
        with self.autocast:
            output = self.model(batch.inputs["tokens"])
            logits = output if isinstance(output, Tensor) else output.logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._losses.append(loss.detach())

    def losses(self) -> list[float]:
        """Of every step so far."""
        return [loss.item() for loss in self._losses]


def _adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def model_line() -> str:
    """The model's own description."""
    with torch.device("meta"):
        return repr(build_model(config_of("fp32", False).model)).splitlines()[0]


def help_seconds() -> float:
    """The median time of `trireme --help`."""
    command = [str(Path(sys.executable).with_name("trireme")), "--help"]
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
