"""Published runs: the file says what it should, and the planner comes near to those that it was not fitted to."""

import re
from pathlib import Path

import pytest

from benchmarks.published_runs import Published, mean_error, narayanan_flops, read
from model.config import ModelConfig
from model.count import parameter_count
from parallel.planner.hardware import load_device

PAGE = Path(__file__).parents[3] / "docs" / "planner.md"


@pytest.fixture(scope="module")
def published() -> Published:
    return read()


def test_the_file_is_well_formed(published: Published) -> None:
    assert len(published.runs) >= 12
    assert {run.source for run in published.runs} == published.sources.keys()
    assert {run.model for run in published.runs} == published.models.keys()
    assert len({run.model_dump_json() for run in published.runs}) == len(published.runs)
    for run in published.runs:
        assert published.sources[run.source].url.startswith("https://")
        assert run.global_batch % (run.micro_batch * run.arrangement.layout.data_size) == 0, run
        assert (
            0.2
            < published.measured(run)
            * 6
            * _parameters(published, run.model)
            / (load_device(run.device).peak_flops("bf16"))
            < 0.7
        ), run


def _parameters(published: Published, name: str, seq_len: int = 2048) -> int:
    model = ModelConfig.model_validate(published.models[name] | {"max_seq_len": seq_len})
    return parameter_count(model).total


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # the column NumParams of llm-foundry's tables
        ("mpt-1b", 1315950592),
        ("mpt-3b", 2651837440),
        ("mpt-7b", 6658859008),
        ("mpt-13b", 12853954560),
        ("mpt-30b", 29975214080),
        ("mpt-70b", 64862437376),
        # Narayanan et al. 2021, table 2
        ("gpt3-175b", 174.6e9),
    ],
)
def test_models_have_their_published_sizes(published: Published, name: str, count: float) -> None:
    assert _parameters(published, name) == pytest.approx(count, rel=2e-4)


def test_every_other_run_is_held_out(published: Published) -> None:
    for number, run in enumerate(published.runs, start=1):
        assert (run in published.fitted, run in published.held_out) == (number % 2 == 1, number % 2 == 0)
    for half in (published.fitted, published.held_out):
        assert {run.device for run in half} == {run.device for run in published.runs}


def test_flops_of_megatron_are_those_of_its_paper(published: Published) -> None:
    """34 days for 300 B tokens on 1,024 GPUs at 140 TFLOP/s (Narayanan et al. 2021, section 5.1)."""
    model = ModelConfig.model_validate(published.models["gpt3-175b"] | {"max_seq_len": 2048})
    assert narayanan_flops(model) * 300e9 / (1024 * 140e12) / 86400 == pytest.approx(34, rel=0.03)


def test_the_error_is_what_the_page_says(published: Published) -> None:
    match = re.search(r"mean absolute error is under (\d+) % of both halves", PAGE.read_text())
    assert match is not None
    for half in (published.fitted, published.held_out):
        assert mean_error(published, half) < float(match[1]) / 100
