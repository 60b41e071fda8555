"""The curves of runs as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from train.run_folder import RunFolder, read_metrics

_PANELS = (
    ("loss", "loss (nats per token)", "linear"),
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm before clipping", "log"),
    ("tokens_per_second", "tokens per second", "linear"),
)


def plot_runs(runs: Sequence[str], out: Path | None) -> Path:
    """Draw loss, learning rate, gradient norm and speed over tokens. Returns the picture's path.

    Raises:
        RunError: a run has no metrics.
    """
    folders = [RunFolder(Path(run)) for run in runs]
    metrics = {folder.path.name: read_metrics(folder) for folder in folders}
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (key, label, scale) in zip(axes.flat, _PANELS, strict=True):
        for name, rows in metrics.items():
            _draw(axis, key, name, rows)
        axis.set(xlabel="tokens", ylabel=label, yscale=scale)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if scale == "linear":
            axis.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_second" else "{x:.4g}")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.suptitle(", ".join(metrics))
    path = out or folders[0].path / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw(axis: Axes, key: str, name: str, rows: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] for row in rows]
    line = axis.plot(tokens, [row[key] for row in rows], linewidth=1.2, label=f"{name}: training")[0]
    evaluated = [row for row in rows if "validation_loss" in row]
    if key == "loss" and evaluated:
        axis.plot(
            [row["tokens"] for row in evaluated],
            [row["validation_loss"] for row in evaluated],
            "o--",
            color=line.get_color(),
            alpha=0.7,
            label=f"{name}: validation",
        )
