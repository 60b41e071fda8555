"""`trireme scaling`: files in, numbers and pictures out, and one line for every mistake."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.errors import InputError
from tests.train.scaling.synthetic import CHINCHILLA, isoflop_points
from train.cli import app
from train.counts import format_count, parse_count
from train.errors import ConfigError
from train.scaling.points import read_points, write_points

GOOD = "params,tokens,loss\n1e6,1e7,4\n2e6,2e7,3.8\n4e6,4e7,3.6\n1e6,4e7,3.9\n2e6,4e7,3.7\n4e6,1e7,3.9\n"


def trireme(*arguments: str) -> str:
    """Run the command in this process; returns what it prints."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with points.csv and what a fit of it writes."""
    folder = tmp_path_factory.mktemp("fit")
    write_points(folder / "points.csv", isoflop_points(CHINCHILLA, noise=0.002))
    shown = trireme("scaling", "fit", str(folder / "points.csv"), "--out", str(folder), "--samples", "50")
    assert "alpha 0.3" in shown and "isoflop  a 0.4" in shown and "54 runs" in shown
    return folder


def test_a_fit_is_json_and_pictures(fitted: Path) -> None:
    found = json.loads((fitted / "fit.json").read_text())
    assert found["constants"]["alpha"]["value"] == pytest.approx(0.34, abs=0.03)
    assert len(found["samples"]) == 50 and found["count"] == 54
    for name in ("isoflop", "frontier", "residuals"):
        assert (fitted / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_predictions(fitted: Path) -> None:
    lines = trireme("scaling", "predict", "--flops", "1e21", "--fit", str(fitted / "fit.json")).splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines[1:]}
    best = CHINCHILLA.optimum(1e21, 6.0)
    assert values["params"] == pytest.approx(best.params, rel=0.1)
    assert values["tokens"] == pytest.approx(best.tokens, rel=0.1)
    assert values["loss"] == pytest.approx(best.loss, rel=0.005)
    run = ("--params", "70B", "--tokens", "1.4T", "--fit", str(fitted / "fit.json"))
    assert "5.88e+23 FLOPs, 196 times the largest run" in trireme("scaling", "predict", *run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no column 'params'"),
        ("params,tokens\n1,1\n", "there is no column 'loss': the first line names params,tokens,loss"),
        ("params,tokens,loss,lr\n", "unknown column 'lr'"),
        ("params,tokens,loss,loss\n", "a column comes twice"),
        ("params,tokens,loss\n1e6,1e7,4\n", r"has 1 point\(s\): a fit needs 6 or more"),
        ("params,tokens,loss\n" + "1e6,1e7,4\n" * 8, "of at least 3 different params and 3 different tokens"),
        (GOOD + "1e6,-1e7,4\n", r"points.csv:8: tokens='-1e7' is not a positive number"),
        (GOOD + "1e6,,4\n", "points.csv:8: tokens='' is not"),
        (GOOD + "1e6,1e7,nan\n", "points.csv:8: loss='nan' is not"),
        (GOOD + "1e6,1e7,inf\n", "points.csv:8: loss='inf' is not"),
        (GOOD + "1e6,1e7\n", "points.csv:8: 2 values for 3 columns"),
        ("\x00\x01", "column"),
    ],
)
def test_wrong_points_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_points(tmp_path / "points.csv")
    assert "\n" not in str(caught.value)


def test_columns_in_any_order(tmp_path: Path) -> None:
    rows = list(csv.reader(GOOD.splitlines()))
    (tmp_path / "points.csv").write_text("\n".join(",".join([r[2], *r[:2]]) for r in rows) + "\n\n")
    read = read_points(tmp_path / "points.csv")
    assert read.loss[0] == 4 and read.flops[0] == 6e13


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text(GOOD)
    with pytest.raises(InputError, match="points.csv/fit can't be made: Not a directory: give a folder"):
        trireme("scaling", "fit", str(tmp_path / "points.csv"), "--out", str(tmp_path / "points.csv" / "fit"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_points(tmp_path / "points.csv")
    (tmp_path / "fit.json").write_text("{}")
    for name in ("fit.json", "none.json"):
        with pytest.raises(InputError, match=f"{name} is no fit: make one by `trireme scaling fit"):
            trireme("scaling", "predict", "--flops", "1e21", "--fit", str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --flops, or --params and --tokens"),
        (["--params", "7B"], "give --flops, or --params and --tokens"),
        (["--flops", "1e21", "--params", "7B", "--tokens", "1T"], "give --flops, or"),
        (["--flops", "much"], "--flops: 'much' is not a positive number: write 300M, 1.5B or 1e20"),
        (["--flops", "-1"], "--flops: '-1' is not a positive number"),
    ],
)
def test_wrong_questions(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trireme("scaling", "predict", *arguments)


def test_counts_as_people_write_them() -> None:
    assert [parse_count(text) for text in ("300M", "1.5b", "1e20", 7, "2.5T", " 12 k ")] == [
        3e8,
        1.5e9,
        1e20,
        7,
        2.5e12,
        12e3,
    ]
    assert [format_count(number) for number in (3e8, 1.536e9, 1e20, 7, 2.5e12)] == [
        "300M",
        "1.54B",
        "1e+20",
        "7",
        "2.5T",
    ]
    for wrong in ("", "M", "0", "-3", "1e999", "nan", "3 M M", None, True, "1,000"):
        with pytest.raises(ValueError, match="is not a positive number"):
            parse_count(wrong)
