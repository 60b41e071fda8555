"""A step's timeline in the picture of a plan."""

from matplotlib.axes import Axes

from parallel.planner.estimate import Estimate
from parallel.planner.timeline import Span, timeline
from train.plan import format_seconds

COLOURS = {
    "forward": "#6f9fd8",
    "backward": "#3c8d5a",
    "communication": "#e3a857",
    "optimizer": "#8e5ea2",
}
WAITING = "#e8e8e8"
MOST_ROWS = 16
"""Ranks of a pipeline that are drawn; of more, as many at even distances."""
MOST_SPANS = 40
"""That are drawn side by side; of a longer step its beginning and its end."""
GAP = 0.02
"""Of the width, between these."""
LABELLED = 0.014
"""Of the width: a block that has room for its number."""


def draw_timeline(axis: Axes, found: Estimate) -> None:
    """What each rank of the pipeline does in a step, or one rank where there is none, by micro-batch."""
    spans = timeline(found)
    places = _shown(found.arrangement.layout.pp)
    length = max(span.stop for span in spans)
    window = _window([span for span in spans if span.place == places[0]], length)
    width = length if window is None else window * 2 / (1 - GAP)
    for row, place in enumerate(places):
        for start, stop in ((0.0, length),) if window is None else ((0.0, window), (width - window, width)):
            axis.barh(row, stop - start, left=start, color=WAITING, height=0.8)
        for span in (each for each in spans if each.place == place):
            _draw(axis, row, span, length, width, window)
    _legend(axis)
    _axes(axis, found, places, length, width, window)


def _shown(pp: int) -> list[int]:
    if pp <= MOST_ROWS:
        return list(range(pp))
    return [round(row * (pp - 1) / (MOST_ROWS - 1)) for row in range(MOST_ROWS)]


def _window(row: list[Span], length: float) -> float | None:
    """Seconds of the beginning and of the end that are drawn; None: all."""
    if len(row) <= 2 * MOST_SPANS:
        return None
    start = sorted(span.stop for span in row)[MOST_SPANS]
    end = length - sorted((span.start for span in row), reverse=True)[MOST_SPANS]
    return min(max(start, end), length * 0.45)


def _draw(axis: Axes, row: int, span: Span, length: float, width: float, window: float | None) -> None:
    start, stop = span.start, span.stop
    if window is not None:
        if start < window:
            stop = min(stop, window)
        elif stop > length - window:
            start, stop = (max(edge, length - window) - length + width for edge in (start, stop))
        else:
            return
    axis.barh(
        row, stop - start, left=start, color=COLOURS[span.what], height=0.8, edgecolor="white", linewidth=0.3
    )
    if span.what in ("forward", "backward") and stop - start > width * LABELLED:
        text = str(span.micro_batch)
        axis.text((start + stop) / 2, row, text, ha="center", va="center", fontsize=6, color="white")


def _legend(axis: Axes) -> None:
    for what, colour in {**COLOURS, "waiting": WAITING}.items():
        axis.bar(0, 0, color=colour, label=what)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, fontsize=8, frameon=False)


def _axes(
    axis: Axes, found: Estimate, places: list[int], length: float, width: float, window: float | None
) -> None:
    pp = found.arrangement.layout.pp
    axis.set_yticks(
        range(len(places)), [f"stage {place}" if pp > 1 else "a rank" for place in places], fontsize=8
    )
    axis.set(xlim=(0, width), ylim=(len(places) - 0.5, -0.5))
    count = found.arrangement.micro_batches(found.run)
    title = f"a step by micro-batch, of {count}: {format_seconds(length)}"
    if window is None:
        axis.set_xlabel("seconds")
    else:
        title += f"; its first and last {format_seconds(window)}"
        marks = [0.0, window / 2]
        axis.set_xticks(
            [*marks, *(width - mark for mark in reversed(marks))],
            [*(f"{mark:.3g}" for mark in marks), *(f"{length - mark:.4g}" for mark in reversed(marks))],
        )
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
