"""A plan as a picture: memory, step, its timeline and layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from parallel.planner.estimate import ROOM, Estimate
from train.counts import format_count
from train.plan import Plan, format_seconds
from train.plan_timeline import MOST_ROWS, draw_timeline

MEMORY_COLOURS = {
    "weights": "#3b6fb6",
    "gradients": "#6f9fd8",
    "optimizer": "#a9c8ec",
    "gathered": "#e3a857",
    "activations": "#c8553d",
    "logits": "#8e5ea2",
    "reserve": "#b8b8b8",
}
TIME_COLOURS = {
    "compute": "#3c8d5a",
    "recompute": "#93c47d",
    "elementwise": "#d9d36b",
    "launch": "#efe9a9",
    "dp": "#e3a857",
    "tp": "#c8553d",
    "cp": "#8e5ea2",
    "ep": "#5f4b8b",
    "pp": "#3b6fb6",
    "bubble": "#d0d0d0",
    "optimizer": "#a9c8ec",
    "host": "#7f7f7f",
}
NODE_COLOURS = ("#6f9fd8", "#a9c8ec")
SHOWN = 4
"""Rivals beside the best."""
MOST_CELLS = 16
"""Of ranks drawn in a row; more are told in words."""


def draw_plan(name: str, plan: Plan, path: Path) -> Path:
    """Draw memory and time of the best layouts, a step of the best, and how it lies on the devices. Returns the
    picture's path."""
    found = [plan.best, *plan.rivals[:SHOWN]]
    rows = 1.2 + 0.55 * len(found), 1.1 + 0.2 * min(plan.best.arrangement.layout.pp, MOST_ROWS), 2.4
    figure = pyplot.figure(figsize=(13, 1.4 * sum(rows)), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=rows)
    memory = figure.add_subplot(grid[0, 0])
    time = figure.add_subplot(grid[0, 1], sharey=memory)
    time.tick_params(labelleft=False)
    labels = [_label(each) for each in found]
    _bars(memory, labels, [_scaled(each.memory.parts, 1e9) for each in found], MEMORY_COLOURS)
    _limits(memory, plan.best)
    _bars(time, labels, [each.time.parts for each in found], TIME_COLOURS)
    for place, each in enumerate(found):
        text = f" {format_seconds(each.time.total)}, MFU {each.utilization:.0%}"
        time.text(each.time.total, place, text, va="center", fontsize=9)
    time.set(title="a step, seconds", xlim=(0, max(each.time.total for each in found) * 1.3))
    memory.set(title="memory of the fullest device at its peak, GB")
    draw_timeline(figure.add_subplot(grid[1, :]), plan.best)
    _layout(figure.add_subplot(grid[2, :]), plan.best)
    training, device = plan.training, plan.best.device
    devices = f"{plan.best.arrangement.layout.world_size} x {device.name}"
    length = f"{format_count(training.tokens)} tokens in {training.days:.3g} days"
    figure.suptitle(f"{name} on {devices}: {length}, \\${format_count(training.dollars)}", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _label(found: Estimate) -> str:
    arrangement = found.arrangement
    again = arrangement.activation_checkpoint
    every = f" {again.n}" if again.mode == "every_nth" else ""
    pipeline = f"{arrangement.parallel.pp_schedule}, " if arrangement.layout.pp > 1 else ""
    cut = str(arrangement.layout).replace(" x ", " · ")
    return f"{cut}\n{pipeline}micro-batch {arrangement.micro_batch_size}, recompute {again.mode}{every}"


def _scaled(parts: Mapping[str, float], unit: float) -> dict[str, float]:
    return {name: value / unit for name, value in parts.items()}


def _bars(
    axis: Axes, labels: Sequence[str], rows: Sequence[Mapping[str, float]], colours: Mapping[str, str]
) -> None:
    largest = max(sum(row.values()) for row in rows)
    lefts = [0.0] * len(rows)
    for part, colour in colours.items():
        widths = [row[part] for row in rows]
        if max(widths) < largest / 200:
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
            continue
        axis.barh(range(len(rows)), widths, left=lefts, color=colour, label=part, height=0.62)
        for place, (left, width) in enumerate(zip(lefts, widths, strict=True)):
            if width > largest * 0.07:
                axis.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=8)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _limits(axis: Axes, best: Estimate) -> None:
    full = best.device.memory_bytes / 1e9
    axis.axvline(full, color="black", linewidth=1.4)
    axis.axvline(full * ROOM, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, full * 1.08)
    axis.text(full * 1.01, 0, f"{full:.0f} GB", rotation=90, ha="left", va="center", fontsize=8)


def _layout(axis: Axes, best: Estimate) -> None:
    """One copy of the model over its ranks, stages side by side; without a pipeline several copies."""
    layout, node = best.arrangement.layout, best.device.devices_per_node
    copies = layout.dp_replicate * layout.dp_shard
    name, boxes = ("stage", layout.pp) if layout.pp > 1 else ("group", copies)
    shown = min(boxes, MOST_CELLS)
    for box in range(shown):
        first = box * layout.cp * layout.tp * (copies if layout.pp > 1 else 1)
        _box(axis, box, first, layout.cp, layout.tp, node)
        axis.text(box + 0.45, 1.05, f"{name} {box}", ha="center", va="bottom", fontsize=8)
    if shown < boxes:
        axis.text(shown + 0.05, 0.5, f"... {boxes - shown} more", va="center", fontsize=10)
    axis.set(xlim=(-0.1, max(shown, 8) + 1.2), ylim=(-0.75, 1.3))
    axis.axis("off")
    words = [
        f"One of {copies} groups that read different data, of pp {layout.pp} x cp {layout.cp} x tp {layout.tp} ranks; "
        f"a square is a rank, colours change with the node of {node}.",
        f"Weights are sharded over dp_shard {layout.dp_shard} x cp {layout.cp} ranks"
        + (f", of which there are {layout.dp_replicate} replicas" if layout.dp_replicate > 1 else "")
        + (f"; experts are shared out over ep {layout.ep}." if layout.ep > 1 else "."),
        f"Each works through {best.arrangement.micro_batches(best.run)} micro-batches of "
        f"{best.arrangement.micro_batch_size} sequence(s) a step.",
    ]
    for place, line in enumerate(words):
        axis.text(0, -0.15 - 0.22 * place, line, va="top", fontsize=9)


def _box(axis: Axes, place: int, first: int, rows: int, columns: int, per_node: int) -> None:
    """A square for each rank from the first on, at most so many in a row and a column."""
    width, height = 0.9 / min(columns, MOST_CELLS), 1.0 / min(rows, MOST_CELLS)
    for row in range(min(rows, MOST_CELLS)):
        for column in range(min(columns, MOST_CELLS)):
            node = (first + row * columns + column) // per_node
            corner = place + column * width, 1 - (row + 1) * height
            axis.add_patch(Rectangle(corner, width * 0.9, height * 0.86, color=NODE_COLOURS[node % 2]))
