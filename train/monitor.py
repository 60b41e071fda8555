"""What listens to a run: metrics.jsonl, TensorBoard, and the line that a person watches."""

import logging
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from data.codebook import write_png
from train.config import Config
from train.duration import format_seconds
from train.lines import Lines
from train.metrics import ExpertLoad, Metrics
from train.resolve import Plan
from train.run_folder import RunFolder, to_yaml
from train.samples import Pictures, Sample

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears of every step and every sample, on rank 0."""

    def step(self, metrics: Metrics) -> None:
        """A step is done."""

    def sample(self, step: int, sample: Sample) -> None:
        """Text or pictures were generated."""

    def close(self) -> None:
        """The run stops."""


class Monitor:
    """Passes on what happens to all listeners; on other ranks than the first there are none.

    One that can't write, on a disk that is full or read-only, hears no more, which is said: training doesn't end for
    it, but with the next checkpoint that can't be written either.
    """

    def __init__(self, listeners: list[Listener]) -> None:
        self.listeners = listeners

    def step(self, metrics: Metrics) -> None:
        """A step is done."""
        self._tell(lambda listener: listener.step(metrics))

    def sample(self, step: int, sample: Sample) -> None:
        """Text or pictures were generated."""
        self._tell(lambda listener: listener.sample(step, sample))

    def close(self) -> None:
        """The run stops."""
        self._tell(lambda listener: listener.close())

    def _tell(self, tell: Callable[[Listener], None]) -> None:
        for listener in list(self.listeners):
            try:
                tell(listener)
            except OSError as error:
                self.listeners.remove(listener)
                what = type(listener).__name__
                log.warning(
                    "%s: %s: nothing more is written there until the run is started again", what, error
                )


def make_monitor(folder: RunFolder, plan: Plan, start: int) -> Monitor:
    """The listeners that the configuration asks for, of a run that goes on from step `start`."""
    listeners: list[Listener] = [JsonLines(folder.metrics), SampleFiles(folder.samples)]
    if plan.config.monitor.tensorboard:
        listeners.append(TensorBoard(folder.tensorboard, plan.config, start))
    if sys.stdout.isatty():
        listeners.append(ProgressLine(plan.total_steps, start))
    else:
        listeners.append(PlainLines(plan.total_steps, plan.config.monitor.print_every_steps))
    return Monitor(listeners)


class JsonLines(Lines):
    """metrics.jsonl: an object a step; there from the start."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file = FileIO(path, "ab")

    def step(self, metrics: Metrics) -> None:
        """Append a line."""
        self.append(metrics.values())

    def sample(self, step: int, sample: Sample) -> None:
        """Samples have no place here."""


class Newest:
    """Remembers the newest step, for what a checkpoint says of it."""

    metrics: Metrics | None = None

    def step(self, metrics: Metrics) -> None:
        """Remember it."""
        self.metrics = metrics

    def sample(self, step: int, sample: Sample) -> None:
        """Samples have no place here."""

    def close(self) -> None:
        """Nothing is pending."""


class SampleFiles:
    """samples/: a PNG for each sample of pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, metrics: Metrics) -> None:
        """Steps have no place here."""

    def sample(self, step: int, sample: Sample) -> None:
        """Write pictures; text is in TensorBoard."""
        if isinstance(sample, Pictures):
            self.folder.mkdir(exist_ok=True)
            write_png(sample.pixels, self.folder / f"step-{step:08d}.png")

    def close(self) -> None:
        """Nothing is pending."""


class TensorBoard:
    """Scalars, the experts' loads, samples, the configuration as text, and hyperparameters."""

    def __init__(self, folder: Path, config: Config, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self.histograms_every = config.monitor.print_every_steps
        self.writer.add_text("config", f"```yaml\n{to_yaml(config)}\n```", start)
        settings = {
            "lr": config.optimizer.lr,
            "global_batch_size": config.data.global_batch_size,
            "d_model": config.model.d_model,
            "num_layers": config.model.num_layers,
            "precision": config.precision,
            "seed": config.run.seed,
        }
        events = self.writer._get_file_writer()
        for summary in hparams(settings, {"train/loss": 0, "validation/loss": 0}):
            events.add_summary(summary)

    def step(self, metrics: Metrics) -> None:
        """Write every value as a scalar."""
        values = metrics.numbers()
        step = int(values.pop("step"))
        if "validation_loss" in values:
            self.writer.add_scalar("validation/loss", values.pop("validation_loss"), step)
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        for name, count in metrics.epochs.items():
            self.writer.add_scalar(f"epochs/{name}", count, step)
        if metrics.experts is not None:
            self._experts(metrics.experts, step)

    def _experts(self, experts: ExpertLoad, step: int) -> None:
        """A curve for each layer, and at times a histogram, whose bars are its experts."""
        for layer, (imbalance, dropped) in enumerate(zip(experts.imbalance, experts.dropped, strict=True)):
            self.writer.add_scalar(f"experts/imbalance/{layer}", imbalance, step)
            self.writer.add_scalar(f"experts/dropped/{layer}", dropped, step)
        if step % self.histograms_every:
            return
        for layer, load in enumerate(experts.load):
            ends = list(range(1, len(load) + 1))
            self.writer.add_histogram_raw(
                f"experts/load/{layer}",
                min=0,
                max=len(load),
                num=1,
                sum=sum(load),
                sum_squares=sum(share**2 for share in load),
                bucket_limits=ends,
                bucket_counts=load,
                global_step=step,
            )

    def sample(self, step: int, sample: Sample) -> None:
        """Write the sample; in text, Markdown has no meaning."""
        if isinstance(sample, Pictures):
            self.writer.add_image("sample", sample.pixels, step, dataformats="HWC")
        else:
            self.writer.add_text("sample", "".join(f"    {line}\n" for line in sample.splitlines()), step)

    def close(self) -> None:
        """Write what is pending."""
        self.writer.close()


class PlainLines:
    """For a pipe or a log file: a line every so many steps."""

    def __init__(self, total_steps: int | None, every: int) -> None:
        self.total_steps, self.every = total_steps, every

    def step(self, metrics: Metrics) -> None:
        """Print a line, where it is time."""
        due = metrics.step % self.every == 0 or metrics.step == self.total_steps
        if due or metrics.validation_loss is not None:
            print(describe(metrics, self.total_steps), flush=True)

    def sample(self, step: int, sample: Sample) -> None:
        """Print the sample."""
        print(_describe_sample(step, sample), flush=True)

    def close(self) -> None:
        """Nothing is pending."""


class ProgressLine:
    """For a terminal: a bar with the newest step beside it."""

    def __init__(self, total_steps: int | None, start: int) -> None:
        self.total_steps = total_steps
        columns = (BarColumn(10), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=Console())
        self.task = self.progress.add_task("starting", total=total_steps, completed=start)
        self.progress.start()

    def step(self, metrics: Metrics) -> None:
        """Move the bar; a validation loss stays on the screen as a line."""
        text = describe(metrics, self.total_steps)
        self.progress.update(self.task, completed=metrics.step, description=text)
        if metrics.validation_loss is not None:
            self.progress.console.print(text, highlight=False)

    def sample(self, step: int, sample: Sample) -> None:
        """Print the sample above the bar."""
        self.progress.console.print(_describe_sample(step, sample), markup=False, highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.progress.stop()


def _describe_sample(step: int, sample: Sample) -> str:
    if isinstance(sample, Pictures):
        return f"sample at step {step}: samples/step-{step:08d}.png in the run's folder"
    return f"sample at step {step}:\n{sample}"


def describe(metrics: Metrics, total_steps: int | None) -> str:
    """A step in one line."""
    of = f"/{total_steps}" if total_steps else ""
    parts = [
        f"step {metrics.step}{of}",
        f"loss {metrics.loss:.4f}",
        f"lr {metrics.lr:.2e}",
        f"norm {metrics.grad_norm:.2f}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"mfu {metrics.mfu:.1%}",
        f"{metrics.memory_bytes / 2**30:.2f} GiB",
    ]
    if metrics.validation_loss is not None:
        parts.insert(2, f"validation {metrics.validation_loss:.4f}")
    if total_steps is not None:
        parts.append(f"ETA {format_seconds((total_steps - metrics.step) * metrics.step_seconds)}")
    return "  ".join(parts)
