"""The order of the data is a function of seed and step, whoever reads it and however often it is interrupted."""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import data.shared_memory
from data.config import DataConfig
from data.dataset import DatasetInfo, dataset_path, open_dataset
from data.errors import InputError
from data.mixture import as_one, open_sources
from data.shared_memory import choosing_names, clean_stale_shared_memory
from data.stream import Batch, TrainingStream, validation_batches
from parallel.processes import WorkerPool
from tests.data import ranks

BATCH = 12
WEB, SONGS = 0.7, 0.3


@pytest.fixture(scope="module", params=["a data set", "a mixture"])
def given(request: pytest.FixtureRequest, prepared: DatasetInfo, prepared_too: DatasetInfo) -> DataConfig:
    """What is read: one data set, or two, of which the smaller is gone through time and again."""
    if request.param == "a data set":
        return config(prepared)
    assert prepared_too.train.sequences * 5 < prepared.train.sequences
    return DataConfig.model_validate(mixture(prepared, prepared_too) | BATCHES)


BATCHES = {"micro_batch_size": 2, "global_batch_size": BATCH, "num_workers": 0}


def mixture(web: DatasetInfo, songs: DatasetInfo) -> dict[str, Any]:
    sources = [("web", web, 10 * WEB), ("songs", songs, 10 * SONGS)]
    return {"sources": [{"name": name, "path": str(i.path), "proportion": part} for name, i, part in sources]}


def config(info: DatasetInfo, **values: int | bool) -> DataConfig:
    return DataConfig.model_validate({"path": str(info.path)} | BATCHES | values)


def with_workers(given: DataConfig, num_workers: int) -> DataConfig:
    return given.model_copy(update={"num_workers": num_workers})


@pytest.fixture(scope="module")
def epoch(given: DataConfig) -> int:
    """Global batches that streaming puts in order at a time."""
    sequences = as_one(open_sources(given)).train.sequences
    assert sequences % BATCH, "there shall be sequences left over"
    return sequences // BATCH


@pytest.fixture(scope="module")
def order(given: DataConfig, epoch: int) -> list[list[int]]:
    """The global batches of three such stretches, each sorted, as one process reads them."""
    ids, state = ranks.read(given, 3 * epoch)
    sequences = state.pop("sequences")
    assert state == {"batches": 3 * epoch, "global_batch_size": BATCH, "seed": 7}
    assert sum(sequences.values()) == 3 * epoch * BATCH
    return [sorted(batch) for batch in ids]


def together(shares: list[ranks.Read]) -> list[list[int]]:
    """Global batches from the ranks' shares."""
    assert all(state == shares[0][1] for _, state in shares)
    return [
        sorted(at for part in parts for at in part) for parts in zip(*(ids for ids, _ in shares), strict=True)
    ]


def test_a_batch_is_input_targets_and_ids(prepared: DatasetInfo) -> None:
    from data.sequences import ValidationSequences

    seen: set[int] = set()
    for batch in validation_batches(str(prepared.path), 2, 0, 1):
        (tokens,) = batch.inputs.values()
        assert tokens.shape == batch.targets.shape == (2, prepared.seq_len)
        assert {tokens.dtype, batch.targets.dtype, batch.sample_ids.dtype} == {torch.int64}
        scored = batch.targets[:, :-1] != -100
        assert torch.equal(batch.targets[:, :-1][scored], tokens[:, 1:][scored])
        assert not (batch.targets == prepared.pad_id).any()
        seen.update(batch.sample_ids.tolist())
    scored_tokens = sum(
        (batch.targets != -100).sum().item() for batch in validation_batches(str(prepared.path), 2, 0, 1)
    )
    assert scored_tokens == prepared.validation.tokens
    assert len(ValidationSequences(prepared)) == len(seen - {-1})


def test_micro_batches_and_devices() -> None:
    rows = torch.arange(10).view(5, 2)
    batch = Batch({"tokens": rows, "classes": torch.arange(5)}, rows + 1, torch.arange(5))
    parts = list(batch.micro_batches(2))
    assert [len(part.targets) for part in parts] == [2, 2, 1]
    assert [part.inputs["classes"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), batch.sample_ids)
    assert batch.to("meta").inputs["tokens"].device.type == "meta"


def test_of_each_source_every_sequence_comes_once_before_any_comes_again(given: DataConfig) -> None:
    sizes = [source.info.train.sequences for source in open_sources(given)]
    batches = 3 * sum(sizes) // BATCH + 1
    ids, state = ranks.read(given, batches)
    first = 0
    for size, taken in zip(sizes, state["sequences"].values(), strict=True):
        mine = [at - first for batch in ids for at in sorted(batch) if first <= at < first + size]
        assert len(mine) == taken > 2 * size
        counts = Counter(mine)
        assert set(counts.values()) <= {taken // size, taken // size + 1}
        before = 0
        for batch in ids:  # at every batch, not at the end alone
            before += sum(first <= at < first + size for at in batch)
            if before >= size:
                break
        assert len(set(mine[:before])) == size and max(Counter(mine[:before]).values()) <= 2
        first += size


def test_seeds_and_shuffle(prepared: DatasetInfo) -> None:
    batches = []
    for seed in (7, 8):
        stream = TrainingStream(config(prepared), seed, 0, 1)
        batches.append(set(next(stream).sample_ids.tolist()))
        stream.close()
    assert batches[0] != batches[1]
    size = prepared.train.sequences
    ids, _ = ranks.read(config(prepared, shuffle=False), size // BATCH + 2)
    flat = [at for batch in ids for at in batch]
    assert flat == [at % size for at in range(len(flat))]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_reading_processes_do_not_matter(
    given: DataConfig, order: list[list[int]], epoch: int, num_workers: int
) -> None:
    ids, _ = ranks.read(with_workers(given, num_workers), 2 * epoch + 1)
    assert [sorted(batch) for batch in ids] == order[: 2 * epoch + 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_do_not_matter(
    given: DataConfig,
    order: list[list[int]],
    epoch: int,
    pools: dict[int, WorkerPool],
    num_workers: int,
) -> None:
    shares = pools[2].run(ranks.read, with_workers(given, num_workers), 3 * epoch)
    assert together(shares) == order


def test_processes_that_share_a_data_rank_read_the_same(
    given: DataConfig, order: list[list[int]], epoch: int, pools: dict[int, WorkerPool]
) -> None:
    first, second = pools[2].run(ranks.read, given, epoch + 2, None, True)
    assert first == second
    assert [sorted(batch) for batch in first[0]] == order[: epoch + 2]


@pytest.mark.parametrize("step", ["middle", "end of epoch", "second epoch"])
def test_resuming_on_other_ranks_goes_on_with_the_same_batches(
    given: DataConfig, order: list[list[int]], epoch: int, pools: dict[int, WorkerPool], step: str
) -> None:
    at = {"middle": 2, "end of epoch": epoch, "second epoch": epoch + 3}[step]
    rest = len(order) - at
    (_, state), (_, same) = pools[2].run(ranks.read, given, at)
    assert state == same
    ids, _ = ranks.read(with_workers(given, 1), rest, state)
    assert [sorted(batch) for batch in ids] == order[at:]
    _, state = ranks.read(given, at)
    assert together(pools[2].run(ranks.read, given, rest, state)) == order[at:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_going_back_and_forth(
    given: DataConfig, order: list[list[int]], epoch: int, num_workers: int
) -> None:
    stream = TrainingStream(with_workers(given, num_workers), 7, 0, 1)
    saved = {}
    for at in range(2 * epoch + 2):
        saved[at] = stream.state_dict()
        next(stream)
    for at in (2 * epoch + 1, 0, epoch, 3, epoch - 1):
        stream.load_state_dict(saved[at])
        assert [sorted(next(stream).sample_ids.tolist()) for _ in range(3)] == order[at : at + 3]
        assert stream.state_dict()["batches"] == at + 3
    stream.close()


def test_a_position_of_another_run_is_refused(prepared: DatasetInfo, prepared_too: DatasetInfo) -> None:
    stream = TrainingStream(config(prepared), 7, 0, 1)
    next(stream)
    here = stream.state_dict()
    with pytest.raises(InputError, match=r"data.global_batch_size=8, the configuration has 12"):
        stream.load_state_dict(here | {"global_batch_size": 8})
    with pytest.raises(InputError, match=r"run.seed=1, the configuration has 7"):
        stream.load_state_dict(here | {"seed": 1})
    stream.close()
    mixed = mixture(prepared, prepared_too)
    stream = TrainingStream(DataConfig.model_validate(mixed | BATCHES), 7, 0, 1)
    with pytest.raises(
        InputError, match=r"1 batches is \{'data': 12\}.*would be \{'web': \d+, 'songs': \d+\}"
    ):
        stream.load_state_dict(here)
    stream.close()


@pytest.mark.parametrize("limit", [None, 1, 7, 10_000])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_covers_the_split_once(prepared: DatasetInfo, size: int, limit: int | None) -> None:
    path = str(prepared.path)
    shares = [list(validation_batches(path, 3, rank, size, limit)) for rank in range(size)]
    assert len({len(batches) for batches in shares}) == 1
    assert all(len(batch.targets) == 3 for batches in shares for batch in batches)
    ids = [at for batches in shares for batch in batches for at in batch.sample_ids.tolist()]
    whole = prepared.validation.sequences
    wanted = min(limit or whole, whole)
    spread = [at * whole // wanted for at in range(wanted)]
    assert sorted(at for at in ids if at >= 0) == spread
    for batches in shares:
        for batch in batches:
            assert (batch.targets[batch.sample_ids < 0] == -100).all()
            assert (batch.targets[batch.sample_ids >= 0] != -100).any(dim=1).all()


def test_what_can_not_be_streamed(
    prepared: DatasetInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"nowhere doesn't exist.*trireme prepare"):
        TrainingStream(DataConfig(path=str(tmp_path / "nowhere")), 0, 0, 1)
    with pytest.raises(InputError, match=r"fewer than one global batch.*at most"):
        TrainingStream(config(prepared, global_batch_size=10_000), 0, 0, 1)
    with pytest.raises(InputError, match="can't be shared by 5 data ranks"):
        TrainingStream(config(prepared), 0, 0, 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2, but torch.distributed joins 1 processes"):
        TrainingStream(config(prepared), 0, 0, 2)
    dataset_path(tmp_path).write_text('{"format": 0}')
    with pytest.raises(InputError, match="format 0, this version reads 1"):
        open_dataset(tmp_path)
    dataset_path(tmp_path).write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json is damaged"):
        open_dataset(tmp_path)


def test_closing_leaves_nothing_behind(prepared: DatasetInfo) -> None:
    stream = TrainingStream(config(prepared, num_workers=1), 7, 0, 1)
    stream.load_state_dict(stream.state_dict())
    stream.load_state_dict(stream.state_dict())
    next(stream)
    assert "streaming" in sys.modules
    assert _mapped_here()
    there = _left_by(_prefix(stream))
    assert there
    stream.close()
    assert not _mapped_here()
    assert not there & _left_by(_prefix(stream))


def _segments() -> list[str]:
    return [
        path.name for path in Path("/dev/shm").iterdir() if data.shared_memory._SEGMENT.fullmatch(path.name)
    ]


@contextmanager
def _mapped_after_removal(name: str) -> Iterator[None]:
    path = Path("/dev/shm", name)
    path.unlink(missing_ok=True)
    with path.open("wb+") as file:
        file.write(b"removed")
        file.flush()
        with mmap.mmap(file.fileno(), 0):
            path.unlink()
            yield


def _left_by(prefix: str) -> set[tuple[str, int]]:
    """A run's segments and locks, told apart from those of a later run that takes the same number."""
    found = set()
    for path in [*Path("/dev/shm").glob(f"{prefix}_*"), *Path("/tmp").glob(f"{prefix}_*_filelock")]:
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_ino))
    return found


def _prefix(stream: TrainingStream) -> str:
    return f"{stream._sequences._shm_prefix_int:06}"


def _mapped_here() -> list[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if data.shared_memory._SEGMENT.search(line) and "deleted" not in line]


def test_a_run_that_starts_beside_another_keeps_to_itself(
    prepared: DatasetInfo, pools: dict[int, WorkerPool]
) -> None:
    from streaming.base.shared.prefix import get_shm_prefix
    from streaming.base.world import World

    pools[2].run(ranks.prefixes, config(prepared))  # imports what takes its time
    with ThreadPoolExecutor() as thread:
        with choosing_names():
            numbers = thread.submit(pools[2].run, ranks.prefixes, config(prepared))
            time.sleep(0.5)  # both ranks could have looked for a free name by now
            here = [str(prepared.path / "train")]
            taken, memory = get_shm_prefix(here, [None], World.detect())
        first, second = numbers.result()
    memory.cleanup()
    assert first == second
    assert taken not in first


def test_a_run_that_waits_for_a_rank_keeps_no_other_from_starting(
    prepared: DatasetInfo, pools: dict[int, WorkerPool], tmp_path: Path
) -> None:
    pools[2].run(ranks.prefixes, config(prepared))  # imports what takes its time
    started = tmp_path / "started"
    with ThreadPoolExecutor() as thread:
        numbers = thread.submit(pools[2].run, ranks.prefixes, config(prepared), str(started))
        time.sleep(0.5)
        TrainingStream(config(prepared), 7, 0, 1).close()
        started.touch()
        first, second = numbers.result()
    assert first == second


KILLED = """
import sys, time
from data.config import DataConfig
from data.stream import TrainingStream
stream = TrainingStream(DataConfig(path=sys.argv[1], num_workers=0), 0, 0, 1)
next(stream)
print(f"{stream._sequences._shm_prefix_int:06}", flush=True)
time.sleep(100)
"""


def test_what_killed_runs_leave_is_removed_and_what_living_ones_use_is_not(prepared: DatasetInfo) -> None:
    living = TrainingStream(config(prepared), 7, 0, 1)
    command = [sys.executable, "-c", KILLED, prepared.path]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True
    ) as run:
        assert run.stdout is not None
        killed = run.stdout.readline().strip()
        os.killpg(run.pid, signal.SIGKILL)
    left = _left_by(killed)
    assert f"/dev/shm/{killed}_locals" in {name for name, _ in left}
    with _mapped_after_removal(f"{killed}_epoch_data"):  # by a process that outlived a run of the same number
        clean_stale_shared_memory()  # unless a run of a test beside this one came before
    assert not left & _left_by(killed)
    assert f"{_prefix(living)}_locals" in _segments()
    assert len(next(living).targets) == BATCH
    living.close()
