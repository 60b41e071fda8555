"""What the planner says of runs that others published: predicted against published tokens/s of a GPU.

python -m benchmarks.published_runs          # the table
python -m benchmarks.published_runs --fit    # the constants of configs/hardware that fit half of the runs best
"""

import argparse
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import log
from pathlib import Path
from statistics import mean
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator

from model.config import ModelConfig, known
from model.count import flops_per_token
from parallel.config import ActivationCheckpointConfig, ParallelConfig
from parallel.planner.estimate import estimate
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device, load_device

PATH = Path(__file__).with_suffix(".yaml")


class Source(BaseModel):
    """Where figures were published."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    url: str


class Run(BaseModel):
    """A run as it was published."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    model: str
    seq_len: PositiveInt
    device: str
    gpus: PositiveInt
    layout: dict[str, Any]
    micro_batch: PositiveInt
    global_batch: PositiveInt
    checkpointing: Literal["none", "every_nth", "full"]
    compiled: bool = False
    tokens_per_second: PositiveFloat | None = None
    tflops: PositiveFloat | None = None
    with_recomputation: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tokens_per_second is None) == (self.tflops is None):
            raise ValueError("give either tokens_per_second or tflops")
        if self.arrangement.layout.world_size != self.gpus:
            raise ValueError(f"layout {self.layout} is not of {self.gpus} GPUs")
        return self

    @cached_property
    def arrangement(self) -> Arrangement:
        """How it was laid over its GPUs."""
        parallel = ParallelConfig(**{"dp_shard": 1, **self.layout})
        return Arrangement(parallel, self.micro_batch, ActivationCheckpointConfig(mode=self.checkpointing))


class Published(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sources: dict[str, Source]
    models: dict[str, dict[str, Any]]
    runs: tuple[Run, ...]

    @cached_property
    def fitted(self) -> tuple[Run, ...]:
        """Those of odd numbers, counted from 1."""
        return self.runs[::2]

    @cached_property
    def held_out(self) -> tuple[Run, ...]:
        """Those of even numbers."""
        return self.runs[1::2]

    @cached_property
    def facts(self) -> dict[tuple[str, int, int, bool], RunFacts]:
        """What is trained, by what of a run decides it."""
        return {_key(run): self._facts(run) for run in self.runs}

    def _facts(self, run: Run) -> RunFacts:
        model = ModelConfig.model_validate(self.models[run.model] | {"max_seq_len": run.seq_len})
        return RunFacts(model, run.seq_len, run.global_batch, compiled=run.compiled)

    def measured(self, run: Run) -> float:
        """Tokens/s of a GPU, from FLOP/s by the formula of its source where these were published."""
        if run.tokens_per_second is not None:
            return run.tokens_per_second
        model = self.facts[_key(run)].model
        flops = narayanan_flops(model) if run.with_recomputation else flops_per_token(model, run.seq_len)
        assert run.tflops is not None
        return run.tflops * 1e12 / flops

    def predicted(self, run: Run, device: Device) -> float:
        """The same of the planner."""
        return estimate(self.facts[_key(run)], run.arrangement, device).tokens_per_second_per_device

    def error(self, run: Run, device: Device) -> float:
        """Predicted over published, less 1."""
        return self.predicted(run, device) / self.measured(run) - 1


def _key(run: Run) -> tuple[str, int, int, bool]:
    return run.model, run.seq_len, run.global_batch, run.compiled


def narayanan_flops(model: ModelConfig) -> float:
    """FLOPs of a token, with all activations recomputed: equation 3 of Narayanan et al. 2021, B and s left out."""
    layers, width, length = model.num_layers, model.d_model, model.max_seq_len
    share = 1 + length / (6 * width) + known(model.vocab_size) / (16 * layers * width)
    return 96 * layers * width**2 * share


def read(path: Path = PATH) -> Published:
    """The published runs."""
    return Published.model_validate(yaml.safe_load(path.read_text()))


def mean_error(published: Published, runs: Iterable[Run], devices: dict[str, Device] | None = None) -> float:
    """The mean of the errors' sizes, with the catalogue's devices or others by their names."""
    known_devices = devices or {}
    return mean(
        abs(published.error(run, known_devices.get(run.device) or load_device(run.device))) for run in runs
    )


def fit(published: Published) -> dict[str, float]:
    """By device, the matmul_efficiency at which the mean log error of its fitted runs is 0; all else as it is."""
    found = {}
    for name in sorted({run.device for run in published.fitted}):
        runs = [run for run in published.fitted if run.device == name]
        low, high = 0.05, 1.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            # by another name, since what a device was asked is remembered by it
            update = {"matmul_efficiency": middle, "name": f"{name} at {middle}"}
            device = load_device(name).model_copy(update=update)
            too_fast = mean(log(1 + published.error(run, device)) for run in runs) > 0
            low, high = (low, middle) if too_fast else (middle, high)
        found[name] = round(high, 2)
    return found


def table(published: Published) -> list[str]:
    """Lines of Markdown: a row for each run, and the mean errors."""
    lines = [
        "| | source | model | tokens | device | layout | recomputed | compiled | published | predicted | error |",
        "|" + "---|" * 11,
    ]
    for number, run in enumerate(published.runs, start=1):
        device = load_device(run.device)
        layout = " ".join(f"{key}={str(value).lower()}" for key, value in run.layout.items())
        half = "fitted" if run in published.fitted else "held out"
        lines.append(
            f"| {number} {half} | {run.source} | {run.model} | {run.seq_len} | {run.device} | `{layout}` | "
            f"{run.checkpointing} | {'yes' if run.compiled else 'no'} | {published.measured(run):,.0f} | "
            f"{published.predicted(run, device):,.0f} | {published.error(run, device):+.1%} |"
        )
    halves = {"fitted": published.fitted, "held out": published.held_out}
    errors = [f"{mean_error(published, runs):.1%} of the {len(runs)} {name}" for name, runs in halves.items()]
    return [*lines, "", f"Mean absolute error: {', '.join(errors)}."]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or the constants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="print the constants that fit the odd runs")
    if parser.parse_args(arguments).fit:
        for name, efficiency in fit(read()).items():
            print(f"configs/hardware/{name}.yaml: matmul_efficiency: {efficiency}")
        return
    print("\n".join(table(read())))


if __name__ == "__main__":
    main()
