"""Presets have published sizes and what the laws say, and can have the layouts that are recommended for them."""

from pathlib import Path

import pytest

from model.count import flops_per_token, parameter_count
from train.config import Config
from train.config_file import load_config
from train.counts import format_count
from train.scaling import recommend

PARAMETERS = {
    "1b": 1_235_814_400,
    "3b": 3_212_749_824,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "30b": 32_519_623_680,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
    "moe-8x1b": 6_873_221_120,
    "moe-8x7b": 46_702_792_704,
    "moe-64x1b": 51_972_212_736,
}
"""1b to 13b, 70b, 405b and moe-8x7b: of the released weights. 30b has another vocabulary than its model, and of the
others an expert is the feed-forward layer of 1b."""
DOCS = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()


def load(name: str, *overrides: str) -> Config:
    return load_config(name, ["data.path=x", *overrides]).config


def table(first: str) -> list[list[str]]:
    """Cells of the table in the documentation whose first heading this is, without the headings."""
    lines = DOCS[DOCS.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters(name: str, count: int) -> None:
    assert parameter_count(load(name).model).total == count


def test_a_mixture_has_the_experts_of_its_dense_model() -> None:
    expert = 3 * 2048 * 8192 * 16
    routers = 2048 * 16
    for experts in (8, 64):
        grown = (experts - 1) * expert + experts * routers
        assert PARAMETERS[f"moe-{experts}x1b"] == PARAMETERS["1b"] + grown


@pytest.mark.parametrize("name", [n + kind for n in PARAMETERS for kind in ("", "-overtrained")])
def test_presets_are_what_the_laws_say(name: str) -> None:
    config = load(name)
    model, tokens = config.model, config.run.tokens
    assert tokens is not None
    params = parameter_count(model).active
    wanted = (
        recommend.overtrained_tokens(params) if "over" in name else recommend.TOKENS_PER_PARAMETER * params
    )
    assert tokens == pytest.approx(wanted, rel=0.01)
    flops = tokens * flops_per_token(model, model.max_seq_len)
    assert config.data.global_batch_size == recommend.batch_sequences(flops, model.max_seq_len)
    assert config.optimizer.lr == pytest.approx(recommend.peak_learning_rate(flops), rel=0.02)
    steps = tokens / (config.data.global_batch_size * model.max_seq_len)
    assert config.schedule.warmup_steps == pytest.approx(recommend.warmup_steps(steps), abs=2)


@pytest.mark.parametrize("row", table("preset"), ids=lambda row: row[0])
def test_the_table_of_presets_is_true(row: list[str]) -> None:
    name, total, active, tokens, flops, batch, lr, warmup, overtrained = row
    config, counts = load(name), parameter_count(load(name).model)
    shown = config.run.tokens or 0
    assert (total, active) == (format_count(counts.total), format_count(counts.active))
    assert flops == f"{shown * flops_per_token(config.model, config.model.max_seq_len):.2g}".replace(
        "e+", "e"
    )
    assert tokens == format_count(shown)
    assert batch == f"{config.data.global_batch_size} x {config.model.max_seq_len}"
    assert (lr, warmup) == (
        f"{config.optimizer.lr:.1e}".replace("e-0", "e-"),
        str(config.schedule.warmup_steps),
    )
    more = load(f"{name}-overtrained")
    assert overtrained == f"{format_count(more.run.tokens or 0)}, {more.data.global_batch_size}"


def test_every_preset_has_a_row() -> None:
    assert [row[0] for row in table("preset")] == [*PARAMETERS]
