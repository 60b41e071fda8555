"""Pictures of a fit: curves of equal compute, the frontier, what the law leaves over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from data.errors import InputError
from train.counts import format_count
from train.scaling.frontier import METHODS, budgets, isoflop, parabola
from train.scaling.points import Points
from train.scaling.report import Report

COLOURS = "viridis"
BEYOND = 30.0
"""How far past the largest run the frontier is drawn, as a factor of FLOPs."""
NARROW = 10.0
"""A range of less than this factor has no powers of ten to mark it."""
COUNTS = FuncFormatter(lambda number, _: format_count(number))
MARKERS = {"isoflop": ("tab:orange", "s"), "envelope": ("tab:green", "^")}


def plot_fit(points: Points, report: Report, folder: Path) -> list[Path]:
    """Draw isoflop.png, frontier.png and residuals.png. Returns their paths."""
    drawn = []
    pictures: dict[str, Callable[[Figure, Points, Report], None]] = {
        "isoflop": _isoflop,
        "frontier": _frontier,
        "residuals": _residuals,
    }
    for name, draw in pictures.items():
        with _saved(folder / f"{name}.png") as figure:
            draw(figure, points, report)
        drawn.append(folder / f"{name}.png")
    return drawn


@contextmanager
def _saved(path: Path) -> Iterator[Figure]:
    figure = pyplot.figure(figsize=(11, 4.8), layout="constrained")
    yield figure
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _isoflop(figure: Figure, points: Points, report: Report) -> None:
    axis = figure.subplots()
    norm = LogNorm(*report.flops_range)
    shown = axis.scatter(
        points.params, points.loss, c=points.flops, norm=norm, cmap=COLOURS, zorder=3, label="runs"
    )
    figure.colorbar(shown, ax=axis, label="training FLOPs")
    sizes = np.geomspace(points.params.min() / 1.5, points.params.max() * 1.5, 200)
    groups = [points.take(group) for group in budgets(points) if len(group) > 2]
    for at, group in enumerate(groups):
        flops = np.exp(np.log(group.flops).mean())
        colour = shown.cmap(norm(flops))
        losses = report.law.loss(sizes, flops / report.flops_factor / sizes)
        visible = losses < points.loss.max() * 1.1
        axis.plot(sizes[visible], losses[visible], color=colour, label=None if at else "the law")
        coefficients = parabola(group)
        if coefficients is not None:
            inside = np.geomspace(group.params.min(), group.params.max(), 100)
            label = None if at else "parabola"
            axis.plot(inside, np.polyval(coefficients, np.log(inside)), ":", color=colour, label=label)
    with suppress(InputError):
        lowest = isoflop(points)
        axis.scatter(
            lowest.params,
            lowest.loss,
            marker="*",
            s=150,
            color="tab:red",
            zorder=4,
            label="lowest of a parabola",
        )
    _logarithmic(axis, "parameters", "loss (nats per token)")
    axis.xaxis.set_major_formatter(COUNTS)
    axis.set_title(f"{len(groups)} budgets of 3 runs or more")
    axis.legend()


def _frontier(figure: Figure, points: Points, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    flops = np.geomspace(report.flops_range[0], report.flops_range[1] * BEYOND, 60)
    predicted = [report.predict(at) for at in flops]
    left.scatter(points.flops, points.loss, color="0.6", s=18, label="runs")
    for axis, name in ((left, "loss"), (right, "params")):
        axis.plot(flops, [p[name].value for p in predicted], color="tab:blue", label="the law's best")
        low, high = [p[name].low for p in predicted], [p[name].high for p in predicted]
        axis.fill_between(flops, low, high, color="tab:blue", alpha=0.2, label="95 % of bootstrap samples")
        axis.axvline(report.flops_range[1], color="0.7", linestyle=":")
    for name, find in METHODS.items():
        with suppress(InputError):
            found, (colour, marker) = find(points), MARKERS[name]
            growth = f"{name}: N grows as C^{found.exponents[0]:.2f}"
            right.plot(found.flops, found.params, marker, color=colour, label=growth)
            right.plot(flops, found.params_at(flops), "--", color=colour, linewidth=1)
            left.plot(found.flops, found.loss, marker, color=colour, label=name)
    _logarithmic(left, "training FLOPs", "loss (nats per token)")
    _logarithmic(right, "training FLOPs", "best number of parameters")
    right.yaxis.set_major_formatter(COUNTS)
    right.set_title(f"the law: N grows as C^{report.law.params_exponent:.2f}")
    for axis in (left, right):
        axis.legend()


def _residuals(figure: Figure, points: Points, report: Report) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    residuals = 100 * (points.loss / report.law.loss(points.params, points.tokens) - 1)
    over = (
        (left, "parameters", points.params, points.tokens),
        (right, "tokens", points.tokens, points.params),
    )
    for axis, name, along, other in over:
        norm = LogNorm(other.min(), other.max())
        shown = axis.scatter(along, residuals, c=other, norm=norm, cmap=COLOURS)
        axis.axhline(0, color="0.5", linewidth=1)
        axis.set_xscale("log")
        axis.set(xlabel=name, ylabel="measured over predicted loss, %")
        axis.xaxis.set_major_formatter(COUNTS)
        axis.grid(alpha=0.3)
        figure.colorbar(shown, ax=axis, label="tokens" if name == "parameters" else "parameters")
    figure.suptitle(f"{report.count} runs, root mean square of log-loss {report.residual:.2%}")


def _logarithmic(axis: Axes, x: str, y: str) -> None:
    """Both axes logarithmic; the narrow range of losses gets ticks of its own."""
    axis.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    low, high = axis.get_ylim()
    if high / low < NARROW:
        axis.set_yticks(np.round(np.geomspace(low, high, 8)[1:-1], 2))
        axis.yaxis.set_major_formatter("{x:.4g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
