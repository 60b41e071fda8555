"""The table of proved layouts in docs/layouts.md, made of what their tests reported.

`make prove-layouts` runs the tests and this: python -m tests.parallel.proved REPORT.xml
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent.parent.parent / "docs" / "layouts.md"
BEGIN, END = "<!-- proved: made by `make prove-layouts` -->\n", "<!-- end of proved -->"
COLUMNS = ("layout", "precision", "with", "model", "cases", "loss", "gradient norm")


@dataclass(frozen=True)
class Proof:
    """A case that passed. `key=value` of its layout, of how it ran and of its model, with spaces between."""

    layout: str
    settings: str
    model: str
    precision: str
    loss: float
    """The largest relative difference from one process, of all ranks and steps."""
    grad_norm: float
    """As `loss`, before clipping."""


class Unproved(Exception):
    """A report of tests that did not all pass."""


def read(report: ElementTree.Element) -> list[Proof]:
    """The proofs in a JUnit report.

    Raises:
        Unproved: a test failed, or wasn't run.
    """
    proofs = []
    for case in report.iter("testcase"):
        if any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
            raise Unproved(f"{case.get('name')} did not pass: make it pass, and run all again")
        noted = {noted.attrib["name"]: noted.attrib["value"] for noted in case.iter("property")}
        loss, grad_norm = float(noted.pop("loss")), float(noted.pop("grad_norm"))
        proofs.append(Proof(**noted, loss=loss, grad_norm=grad_norm))
    return proofs


def rows(proofs: Iterable[Proof]) -> list[tuple[str, ...]]:
    """Cells of the table: a row for each layout in each precision and engine, those of fewer ranks first.

    The last two are figures, the largest of the row's cases.
    """
    groups: defaultdict[str, defaultdict[str, list[Proof]]] = defaultdict(lambda: defaultdict(list))
    for proof in proofs:
        engine = ", deepspeed" if "engine=deepspeed" in proof.settings.split() else ""
        groups[proof.layout][proof.precision + engine].append(proof)
    return [
        (f"`{layout}`" if layout else "one process", precision, *_told(group))
        for layout in sorted(groups, key=_ranks)
        for precision, group in groups[layout].items()
    ]


def _ranks(layout: str) -> int:
    sizes = dict(size.split("=") for size in layout.split())
    return prod(int(size) for name, size in sizes.items() if name != "ep")


def _told(group: Sequence[Proof]) -> tuple[str, ...]:
    settings, model = (_merged(getattr(proof, name) for proof in group) for name in ("settings", "model"))
    worst = (max(getattr(proof, name) for proof in group) for name in ("loss", "grad_norm"))
    return settings, model, str(len(group)), *(f"{figure:.0e}" for figure in worst)


def _merged(settings: Iterable[str]) -> str:
    """Each key once, with all its values."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for setting in " ".join(settings).split():
        key, _, value = setting.partition("=")
        values[key].add(value)
    return "; ".join(f"{key} {', '.join(sorted(values[key]))}".strip() for key in sorted(values))


def table(cells: Sequence[tuple[str, ...]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (COLUMNS, ("---",) * len(COLUMNS), *cells))


def rows_of(page: str) -> list[tuple[str, ...]]:
    """The cells of the table in a page."""
    lines = [line for line in _between(page).splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines[2:]]


def _between(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0]


def measured(report: ElementTree.Element) -> str:
    """How many cases, in what time of each file, and on what machine."""
    seconds: defaultdict[str, float] = defaultdict(float)
    cases = list(report.iter("testcase"))
    for case in cases:
        seconds[case.attrib["classname"].rpartition(".")[2]] += float(case.attrib["time"])
    times = ", ".join(f"`{name}.py` {total:.0f} s" for name, total in seconds.items())
    (machine,) = (noted.attrib["value"] for noted in report.findall("testsuite/properties/property"))
    return f"{len(cases)} cases: {times}, on {machine}.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Put the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote of the tests")
    report = ElementTree.parse(parser.parse_args(arguments).report).getroot()
    try:
        made = f"{table(rows(read(report)))}\n{measured(report)}"
    except Unproved as error:
        sys.exit(f"error: {error}")
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + _between(page), BEGIN + made))


if __name__ == "__main__":
    main()
