"""How step time, memory and checkpoints grow with parameters, context and ranks, against the plan's curves.

Up to 300 M parameters by steps on this CPU, beyond that by simulated ones. A table, and a picture:

python -m benchmarks.growth docs/growth.png
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from model.config import ModelConfig
from model.count import parameter_count
from parallel.config import ActivationCheckpointConfig, ParallelConfig
from parallel.planner.compare import compare
from parallel.planner.estimate import estimate
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import load_device
from parallel.planner.simulate import simulate
from parallel.processes import process_group
from tests.parallel.planner.measured import batch_of, engine_for, measured_peak
from train import checkpoint
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig, OptimizerConfig
from train.counts import format_count
from train.optimizer import make_optimizer
from train.plan import load_for_plan

TOKENS, STEPS = 2048, 3
SIZES = ("1M", "3M", "10M", "30M", "100M", "300M")
LENGTHS = (128, 256, 512, 1024, 2048)
BEYOND = ("1b", "3b", "7b", "13b")
"""Presets, of which one rank of `RANKS` is simulated."""
RANKS = 512
MANY_RANKS = (8, 64, 512, 4096)
"""Over which the 1b preset is sharded."""
BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the weight and two moments of AdamW's, in fp32."""


@dataclass(frozen=True)
class Point:
    """One run. Bytes are of one rank's peak; what isn't measured is None."""

    of: str
    x: float
    parameters: int
    memory: tuple[float, float]
    """Planned, and measured or simulated."""
    seconds: tuple[float, float] | None = None
    """Of a step."""
    saved: tuple[float, float] | None = None
    """Bytes of a checkpoint."""


def main(picture: Path) -> None:
    """Print the table and draw the picture."""
    points: list[Point] = []
    print("| | parameters | x | step, s | memory, MB | checkpoint, MB |")
    print("|---|---|---|---|---|---|")
    for point in measure_all():
        points.append(point)
        print(
            f"| {point.of} | {format_count(point.parameters)} | {point.x:,.0f} | {_told(point.seconds, 1)} | "
            f"{_told(point.memory, 1e6)} | {_told(point.saved, 1e6)} |",
            flush=True,
        )
    draw(points, picture)


def measure_all() -> Iterator[Point]:
    """All points, as they are measured."""
    for size in SIZES:
        model = _model("dial", f"dial.params={size}")
        yield _measured("parameters", parameter_count(model).total, model, 256)
    for length in LENGTHS:
        yield _measured(
            "context", length, _model("dial", "dial.params=10M", f"model.max_seq_len={length}"), length
        )
    for preset in BEYOND:
        model = _model(preset)
        yield _simulated("parameters, simulated", parameter_count(model).total, model, RANKS)
    for ranks in MANY_RANKS:
        yield _simulated("ranks, simulated", ranks, _model("1b"), ranks)


def _model(config: str, *overrides: str) -> ModelConfig:
    model = load_for_plan(config, overrides).model
    assert isinstance(model, ModelConfig)
    return model


def _measured(of: str, x: float, model: ModelConfig, length: int) -> Point:
    """Steps of this process, in fp32."""
    sequences = TOKENS // length
    run = RunFacts(model, length, sequences, "fp32")
    arrangement = Arrangement(ParallelConfig(dp_shard=1), sequences, ActivationCheckpointConfig())
    planned = estimate(run, arrangement, load_device("cpu"))
    with process_group(torch.device("cpu")), tempfile.TemporaryDirectory() as folder:
        engine = engine_for(run, arrangement)
        tokens = torch.randint(0, model.vocab_size or 1, (sequences, length))
        taken = []
        for step in range(STEPS + 1):
            began = time.perf_counter()
            engine.forward_backward(batch_of(tokens), step)
            engine.step(1e-4)
            taken.append(time.perf_counter() - began)
        checkpoint.save(Path(folder), engine.state(), Progress(1, 0, {}), CheckpointConfig(), {})
        saved = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        del engine
    parameters = parameter_count(model).total
    return Point(
        of,
        x,
        parameters,
        (planned.memory.total, measured_peak(run, arrangement)),
        (planned.time.total, median(taken[1:])),
        (BYTES_PER_PARAMETER * parameters, saved),
    )


def _simulated(of: str, x: float, model: ModelConfig, ranks: int) -> Point:
    """One rank's step, of a sequence each, with full recomputation, in bf16."""
    run = RunFacts(model, model.max_seq_len, ranks, "bf16")
    arrangement = Arrangement(ParallelConfig(dp_shard=ranks), 1, ActivationCheckpointConfig(mode="full"))
    step = simulate(run, arrangement, 0, partial(make_optimizer, config=OptimizerConfig()))
    memory = compare(run, arrangement, 0, step).total("memory")
    return Point(of, x, parameter_count(model).total, (memory.planned, memory.simulated))


def _told(pair: tuple[float, float] | None, unit: float) -> str:
    if pair is None:
        return ""
    planned, measured = (value / unit for value in pair)
    return f"{planned:,.2f} / {measured:,.2f}, {planned / measured - 1:+.0%}"


def draw(points: list[Point], picture: Path) -> None:
    """What was planned as lines, what was measured as dots."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels = (
        ("parameters", "seconds", "seconds a step"),
        ("parameters", "memory", "peak memory, bytes"),
        ("parameters", "saved", "checkpoint, bytes"),
        ("context", "seconds", "seconds a step"),
        ("parameters, simulated", "memory", "peak memory of a rank, bytes"),
        ("ranks, simulated", "memory", "peak memory of a rank, bytes"),
    )
    for axis, (of, name, label) in zip(axes.flat, panels, strict=True):
        _panel(axis, [point for point in points if point.of == of], name)
        axis.set(xlabel=of, ylabel=label, xscale="log", yscale="log")
        places = sorted({point.x for point in points if point.of == of})
        axis.set_xticks(places, [f"{x:,.0f}" if x < 1e4 else format_count(int(x)) for x in places])
        axis.set_xticks([], minor=True)
    axes.flat[0].legend()
    figure.savefig(picture, dpi=110)


def _panel(axis: Axes, points: list[Point], name: str) -> None:
    pairs = [getattr(point, name) for point in points]
    places = [point.x for point in points]
    axis.plot(places, [planned for planned, _ in pairs], label="planned")
    axis.plot(places, [measured for _, measured in pairs], "o", color="black", label="measured, or simulated")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
