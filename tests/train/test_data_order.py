"""What a run was trained on, and in what order, is written down, and the same whatever happens to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import open_dataset, tokenizer_path
from data.prepare import prepare
from parallel.processes import WorkerPool
from tests.train.running import train_here
from train import run_folder
from train.config_file import load_config
from train.errors import ConfigError, RunError
from train.order_digest import NOTHING_READ, OrderDigest
from train.resolve import resolve
from train.run_folder import RunFolder, read_metrics


@pytest.fixture(scope="module")
def dataset_too(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A much smaller one, in the tokens of `dataset`."""
    folder = tmp_path_factory.mktemp("songs")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Row, row, row the trireme number {number}. " * 2)
    options: dict[str, Any] = {"seq_len": 32, "validation_fraction": 0.2, "workers": 1}
    prepare([str(folder)], folder / "set", tokenizer=tokenizer_path(dataset), **options)
    return folder / "set"


def mixture(*paths: Path, proportions: tuple[float, ...] = (3, 1)) -> list[str]:
    names = ("chapters", "songs")
    sources = [
        f"{{name: {name}, path: {path}, proportion: {part}}}"
        for name, path, part in zip(names, paths, proportions, strict=True)
    ]
    return ["data.path=null", f"data.sources=[{', '.join(sources)}]"]


def digests(folder: Path) -> list[str]:
    return [row["data_order_digest"] for row in read_metrics(RunFolder(folder))]


STEPS = 16  # of 8 sequences: a quarter of them are several epochs of the songs


def test_a_mixture_is_the_same_on_any_ranks_and_across_interruptions(
    pools: dict[int, WorkerPool], tiny_config: str, dataset: Path, dataset_too: Path, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", f"run.steps={STEPS}", "precision=fp64", *mixture(dataset, dataset_too)]
    pools[1].run(train_here, tiny_config, [*common, "run.name=whole", "evaluation.every_steps=8"])
    whole = read_metrics(RunFolder(tmp_path / "whole"))
    sizes = {"chapters": dataset, "songs": dataset_too}
    for row in whole:
        assert sum(row["sequences"].values()) == 8 * row["step"]
        for name, path in sizes.items():
            epochs = row["sequences"][name] / open_dataset(path).train.sequences
            assert row["epochs"][name] == pytest.approx(epochs, abs=1e-6)
    assert whole[-1]["epochs"]["songs"] > 2, "past the ends of its epochs"
    assert whole[-1]["sequences"]["songs"] / (8 * STEPS) == pytest.approx(0.25, abs=0.1)
    assert len({row["data_order_digest"] for row in whole}) == STEPS

    layouts = {"two": (2, ["data.micro_batch_size=1", "data.num_workers=0"]), "tp": (2, ["parallel.tp=2"])}
    for name, (world, layout) in layouts.items():
        pools[world].run(train_here, tiny_config, [*common, f"run.name={name}", *layout])
        assert digests(tmp_path / name) == digests(tmp_path / "whole")
    for stop, world in ((5, 2), (10, 1), (STEPS, 2)):
        pools[world].run(train_here, tiny_config, [*common, "run.name=parts", f"run.steps={stop}"])
    parts = read_metrics(RunFolder(tmp_path / "parts"))
    for row, part in zip(whole, parts, strict=True):
        for key in ("data_order_digest", "sequences"):
            assert row[key] == part[key]
        assert part["loss"] == pytest.approx(row["loss"], rel=1e-9)
    progress = json.loads((tmp_path / "parts/checkpoints/step-00000016/manifest.json").read_text())[
        "progress"
    ]
    assert progress["data"]["sequences"] == parts[-1]["sequences"]
    assert progress["data_order_digest"] == parts[-1]["data_order_digest"]


def test_validation_of_a_mixture_is_that_of_its_sources_by_their_proportions(
    pools: dict[int, WorkerPool], tiny_config: str, dataset: Path, dataset_too: Path, tmp_path: Path
) -> None:
    def validated(name: str, overrides: list[str]) -> float:
        common = [f"run.dir={tmp_path}", f"run.name={name}", "run.steps=1", "evaluation.every_steps=1"]
        pools[2].run(train_here, tiny_config, [*common, "optimizer.lr=1e-30", *overrides])
        return read_metrics(RunFolder(tmp_path / name))[-1]["validation_loss"]

    alone = [validated(path.name + "-alone", [f"data.path={path}"]) for path in (dataset, dataset_too)]
    mixed = validated("mixed", mixture(dataset, dataset_too))
    assert mixed == pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-5)


def digest_of(steps: list[list[int]], ranks: int = 1, before: str = NOTHING_READ) -> str:
    """As `ranks` ranks make it together, one after the other."""
    shares = [torch.zeros((), dtype=torch.int64) for _ in range(ranks)]

    def total_of(rank: int, share: torch.Tensor) -> torch.Tensor:
        shares[rank] = share
        return sum(shares, torch.zeros((), dtype=torch.int64))

    orders = [
        OrderDigest(lambda share, rank=rank: total_of(rank, share), torch.device("cpu"), before)
        for rank in range(ranks)
    ]
    for step, ids in enumerate(steps):
        for rank, order in enumerate(orders):
            value = order.read(order.add(step, torch.tensor(ids[rank::ranks], dtype=torch.int64)))
    return value


BATCHES = st.lists(st.lists(st.integers(0, 2**40), min_size=4, max_size=4), min_size=2, max_size=6)


@given(BATCHES, st.randoms())
def test_the_digest_knows_the_step_of_every_sequence(steps: list[list[int]], draw: Any) -> None:
    whole = digest_of(steps)
    assert digest_of(steps, ranks=2) == digest_of(steps, ranks=4) == whole
    assert digest_of([draw.sample(ids, 4) for ids in steps]) == whole
    one, other = draw.sample(range(len(steps)), 2)
    swapped = [list(ids) for ids in steps]
    swapped[one][0], swapped[other][3] = swapped[other][3], swapped[one][0]
    same = [sorted(ids) for ids in swapped] == [sorted(ids) for ids in steps]
    assert (digest_of(swapped) == whole) == same
    left_out = [ids[1:] if at == one else ids for at, ids in enumerate(steps)]
    repeated = [[*ids, ids[0]] if at == one else ids for at, ids in enumerate(steps)]
    assert len({whole, digest_of(left_out), digest_of(repeated)}) == 3


def begun(config: str, overrides: list[str]) -> list[str]:
    """A run's folder as it is when training starts."""
    plan = resolve(load_config(config, overrides), world_size=1)
    run_folder.create(run_folder.folder_of(plan.config), plan)
    return overrides


def refused(config: str, overrides: list[str]) -> str:
    plan = resolve(load_config(config, overrides), world_size=1)
    with pytest.raises(RunError) as caught:
        run_folder.check_same_run(run_folder.folder_of(plan.config), plan)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_data_are_refused_by_what_differs(
    tiny_config: str, corpus: Path, dataset: Path, dataset_too: Path, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}"]
    begun(tiny_config, common)
    then, now = (open_dataset(path).train.sequences for path in (dataset, dataset_too))
    line = refused(tiny_config, [*common, f"data.path={dataset_too}"])
    assert (
        f"other data: {dataset_too} holds others (of all {then:,} training sequences then, {now:,} now)"
        in line
    )
    options: dict[str, Any] = {"seq_len": 32, "validation_fraction": 0.2, "workers": 1}
    (tmp_path / "more.txt").write_text("a word that is new, " * 50)
    prepare([str(corpus), str(tmp_path / "more.txt")], tmp_path / "set", vocab_size=300, **options)
    line = refused(tiny_config, [*common, f"data.path={tmp_path / 'set'}"])
    assert f"the tokenizer.model of {tmp_path / 'set'} is another than the run's" in line

    mixed = [*common, "run.name=mixed"]
    begun(tiny_config, [*mixed, *mixture(dataset, dataset_too)])
    line = refused(tiny_config, [*mixed, *mixture(dataset, dataset_too, proportions=(3, 2))])
    assert "data.sources.songs=1.0, now it is 2.0" in line
    assert "data.sources.chapters=3.0, now it is None" in refused(tiny_config, mixed)
    line = refused(tiny_config, [*common, *mixture(dataset, dataset_too)])
    assert "its sources were data, now they are chapters, songs" in line
    moved = tmp_path / "elsewhere"
    shutil.copytree(dataset, moved)
    plan = resolve(load_config(tiny_config, [*mixed, *mixture(moved, dataset_too)]), world_size=1)
    run_folder.check_same_run(run_folder.folder_of(plan.config), plan)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.sources=[{name: web, path: x}]",
            "'data.sources.0.proportion' is missing: set it in the config",
        ),
        ("data.sources=[{name: web, path: x, part: 1, proportion: 1}]", "unknown key 'data.sources.0.part'"),
        (
            "data.sources=[{name: web, path: x, proportion: -1}]",
            "data.sources.0.proportion=-1: input should be",
        ),
        ("data.sources=[{name: web, path: x, proportion: 1}]", "are both given: leave one out"),
        ("data.sources=web", "data.sources='web': input should be"),
    ],
)
def test_wrong_sources_are_told_in_one_line(tiny_config: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
