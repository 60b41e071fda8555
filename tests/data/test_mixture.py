"""Sources that don't go together are refused in one line; those that do are one data set."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.dataset import DatasetInfo, tokenizer_path
from data.errors import InputError
from data.mixture import as_one, open_sources
from data.prepare import prepare
from tests.data.conftest import OPTIONS


def mixture(*infos: DatasetInfo, proportions: tuple[float, ...] = (3, 1)) -> DataConfig:
    return DataConfig.model_validate(
        {
            "sources": [
                {"name": f"source{at}", "path": str(info.path), "proportion": proportion}
                for at, (info, proportion) in enumerate(zip(infos, proportions, strict=True))
            ]
        }
    )


def test_sources_as_one(prepared: DatasetInfo, prepared_too: DatasetInfo) -> None:
    sources = open_sources(mixture(prepared, prepared_too))
    assert [(source.name, source.proportion) for source in sources] == [("source0", 0.75), ("source1", 0.25)]
    whole = as_one(sources)
    assert whole.train.sequences == prepared.train.sequences + prepared_too.train.sequences
    assert whole.validation.tokens == prepared.validation.tokens + prepared_too.validation.tokens
    assert len({whole.digest, prepared.digest, prepared_too.digest}) == 3
    assert as_one(open_sources(DataConfig(path=str(prepared.path)))) == prepared


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8}, "source0 has seq_len=16, source1 has 8: prepare .* again to fit"),
        ({"vocab_size": 300, "tokenizer": None}, "source0 has vocab_size=320, source1 has 300"),
        ({"tokenizer": None}, "source0 has the SHA-256 of tokenizer.model=.*, source1 has"),
    ],
)
def test_what_does_not_go_together(
    prepared: DatasetInfo, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for at in range(20):
        (tmp_path / f"{at}.txt").write_text("other texts of 20 rowers " * at + "and their drummer, ")
    options = OPTIONS | {"tokenizer": tokenizer_path(prepared.path)} | options
    other = prepare([str(tmp_path)], tmp_path / "set", workers=1, **options).dataset
    with pytest.raises(InputError, match=message) as caught:
        open_sources(mixture(prepared, other))
    assert "\n" not in str(caught.value)


def test_other_mistakes(prepared: DatasetInfo, prepared_too: DatasetInfo, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="source1 has proportion=1.0, less than one in 100,000 of all: raise it"
    ):
        open_sources(mixture(prepared, prepared_too, proportions=(1e6, 1)))
    missing = {"name": "web", "path": str(tmp_path / "nowhere"), "proportion": 1}
    with pytest.raises(InputError, match=r"nowhere doesn't exist.*trireme prepare"):
        open_sources(DataConfig.model_validate({"sources": [missing]}))


WEB = {"name": "web", "path": "w", "proportion": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'data.path' is missing: set it to a folder"),
        ({"sources": []}, "'data.path' is missing"),
        ({"path": "x", "sources": [WEB]}, "data.path=x and data.sources are both given: leave one out"),
        (
            {"sources": [WEB, WEB | {"path": "v"}]},
            "data.sources: 2 have name=web: give each a name of its own",
        ),
        ({"sources": [WEB, WEB | {"name": "v"}]}, "data.sources: 2 have path=w"),
        ({"sources": [WEB | {"proportion": 0}]}, "greater than 0"),
        ({"sources": [WEB | {"proportion": float("nan")}]}, "finite number"),
        ({"sources": [{"name": "web", "path": "w"}]}, "proportion\n  Field required"),
    ],
)
def test_sections_that_can_not_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(values)
