"""Presets have published sizes and what the laws say, and can have the layouts that are recommended for them."""

import re
from pathlib import Path

import pytest

from model.count import flops_per_token, parameter_count
from parallel.config import ParallelConfig
from parallel.fit import check_fit, check_micro_batches
from parallel.layout import Layout, resolve_layout
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
GPU_BYTES, FOR_STATE = 80e9, 0.7
"""What of a GPU weights, gradients and optimizer state may take; the rest is for activations and gathered layers."""
MOST_FOR_A_SEQUENCE = 8
"""GPUs, of one node; with more the links between nodes are in the way of every layer."""


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


GPUS = (8, 64, 512, 4096)
CELLS = [
    (row[0], gpus, cell) for row in table("layout for") for gpus, cell in zip(GPUS, row[1:], strict=True)
]


@pytest.mark.parametrize(("name", "gpus", "cell"), [cell for cell in CELLS if cell[2] != "-"])
def test_recommended_layouts_are_not_refused(name: str, gpus: int, cell: str) -> None:
    config = load(name, *(f"parallel.{size}" for size in cell.strip("`").split()))
    parallel, model = config.parallel, config.model
    assert parallel.dp_shard > 0, "the product is checked, so no size may be what is left"
    layout = resolve_layout(parallel, gpus)
    check_fit(layout, parallel, model, model.max_seq_len)
    micro_batches, left = divmod(
        config.data.global_batch_size, layout.data_size * config.data.micro_batch_size
    )
    assert micro_batches > 0 and left == 0
    check_micro_batches(parallel, micro_batches)
    assert state_bytes(config, layout, parallel) < FOR_STATE * GPU_BYTES
    assert gpus * config.data.micro_batch_size / layout.data_size / layout.pp <= MOST_FOR_A_SEQUENCE


@pytest.mark.parametrize(("name", "gpus", "cell"), [cell for cell in CELLS if cell[2] == "-"])
def test_where_none_is_recommended_none_would_do(name: str, gpus: int, cell: str) -> None:
    config = load(name)
    too_large = 16 * parameter_count(config.model).total / gpus > FOR_STATE * GPU_BYTES
    too_many = gpus / config.data.global_batch_size > MOST_FOR_A_SEQUENCE
    assert too_large or too_many


def test_every_preset_has_a_row_in_both_tables() -> None:
    assert [row[0] for row in table("preset")] == [row[0] for row in table("layout for")] == [*PARAMETERS]


def state_bytes(config: Config, layout: Layout, parallel: ParallelConfig) -> float:
    """Of a rank: weight, gradient and AdamW's two moments in fp32; in a pipeline gathered weights (bf16) and whole
    gradients on top (docs/layouts.md). Experts aren't cut by tp."""
    counts = parameter_count(config.model)
    idle = counts.total - counts.active
    experts = (
        0.0
        if config.model.moe is None
        else idle / (1 - config.model.moe.top_k / config.model.moe.num_experts)
    )
    held = ((counts.total - experts) / layout.tp + experts) / layout.pp
    return 16 * held / layout.shard_size + (6 * held if parallel.pp > 1 else 0)


def test_cells_are_written_as_overrides() -> None:
    assert all(cell == "-" or re.fullmatch(r"`\w+=\d+( \w+=\d+)*`", cell) for *_, cell in CELLS)
