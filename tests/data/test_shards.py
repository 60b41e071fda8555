"""A shard that is missing, cut short or damaged is named; or left out, for all ranks alike."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import DatasetInfo, open_dataset
from data.errors import InputError
from data.shards import Shard, check, read_index, without
from data.stream import TrainingStream, validation_batches
from parallel.processes import WorkerPool
from tests.data import ranks


@pytest.fixture
def copy(prepared: DatasetInfo, tmp_path: Path) -> DatasetInfo:
    """Of about ten shards, to be damaged."""
    shutil.copytree(prepared.path, tmp_path / "set")
    return open_dataset(tmp_path / "set")


def config(info: DatasetInfo, **values: Any) -> DataConfig:
    given = {"path": str(info.path), "micro_batch_size": 2, "global_batch_size": 8, "num_workers": 0}
    return DataConfig.model_validate(given | values)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (cut_short, r"has [\d,]+ bytes, [\d,]+ were written"),
    "corrupt": (flip, "is damaged: its SHA-256 is not that of what was written"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_bad_shard_is_named_before_anything_is_read(copy: DatasetInfo, damage: str, split: Any) -> None:
    do, what = DAMAGE[damage]
    shard = read_index(copy, split)[1]
    do(shard.path)
    with pytest.raises(InputError, match=f"^{shard.path} {what}: restore it from a copy") as caught:
        TrainingStream(config(copy), 7, 0, 1)
    assert "\n" not in str(caught.value)
    if damage != "corrupt":  # for which it would have to be read
        with pytest.raises(InputError, match=f"^{shard.path} {what}"):
            check([copy], [split])
    else:
        check([copy], [split])
        TrainingStream(config(copy, verify="size"), 7, 0, 1).close()


def test_every_rank_learns_what_one_found(
    copy: DatasetInfo, prepared: DatasetInfo, pools: dict[int, WorkerPool]
) -> None:
    for at in (1, 2):  # of which each rank checks one
        flip(read_index(copy, "train")[at].path)
    for line in pools[2].run(ranks.refused, config(copy)):
        assert line.startswith(f"{read_index(copy, 'train')[1].path} is damaged")
        assert "(and 1 more of" in line and "\n" not in line
    skipping = config(copy, on_bad_shard="skip")
    shares = pools[2].run(ranks.read, skipping, 40)
    together = [sorted(a + b) for a, b in zip(shares[0][0], shares[1][0], strict=True)]
    alone, state = ranks.read(skipping, 40)
    assert together == [sorted(batch) for batch in alone]
    assert shares[0][1] == state
    later, _ = ranks.read(skipping, 30, ranks.read(skipping, 10)[1])
    assert later == alone[10:]
    undisturbed, _ = ranks.read(config(prepared), 40)
    lost = sum(
        a != b for one, other in zip(undisturbed, alone, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert 0 < lost < 0.4 * 40 * 8, "the others keep their places"


def test_what_is_left_out_is_counted_and_never_read(copy: DatasetInfo) -> None:
    shards = read_index(copy, "train")
    shards[0].path.unlink()
    stream = TrainingStream(config(copy, on_bad_shard="skip", num_workers=1), 7, 0, 1)
    assert stream.bad_shards == (f"{shards[0].path} is missing",)
    assert stream.skipped_sequences == shards[0].sequences
    seen = {at for _ in range(copy.train.sequences // 8) for at in next(stream).sample_ids.tolist()}
    stream.close()
    assert min(seen) >= shards[0].sequences
    for shard in shards[1:]:
        shard.path.unlink()
    with pytest.raises(InputError, match=r"none of the shards below .*train is good"):
        TrainingStream(config(copy, on_bad_shard="skip"), 7, 0, 1)


def test_stand_ins_are_of_the_same_source_and_even() -> None:
    sources = [[Shard(Path(), 0, "", 5), Shard(Path(), 0, "", 10)], [Shard(Path(), 0, "", 4)] * 3]
    ids = without(sources, [[0], [0, 2]])
    assert ids[5:15].tolist() == list(range(5, 15)) and ids[19:23].tolist() == list(range(19, 23))
    assert ids[:5].tolist() == [5, 7, 9, 11, 13]
    assert Counter(ids[15:].tolist()) == dict.fromkeys(range(19, 23), 3)
    assert (without(sources, [[], []]) == np.arange(27)).all()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_goes_bad_under_way_is_named(copy: DatasetInfo, damage: str, num_workers: int) -> None:
    stream = TrainingStream(config(copy, num_workers=num_workers), 7, 0, 1)
    next(stream)
    for shard in read_index(copy, "train"):
        if damage == "missing":
            shard.path.unlink()
        else:
            shard.path.write_bytes(shard.path.read_bytes()[:10])
    with pytest.raises(
        InputError, match=rf"^{copy.path}/train/.*mds can't be read \(.*: restore it"
    ) as caught:
        for _ in range(50):
            next(stream)
    assert "\n" not in str(caught.value)
    stream.close()


def test_a_bad_shard_of_the_validation_split_is_named_when_it_is_read(copy: DatasetInfo) -> None:
    shard = read_index(copy, "validation")[0]
    shard.path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{shard.path} can't be read"):
        list(validation_batches(str(copy.path), 4, 0, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read"),
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"shards": [{}]}', "is damaged"),
        (b'{"shards": []}', "lists 0 sequences"),
        (b"\xff", "is damaged"),
    ],
)
def test_a_bad_index_is_named(copy: DatasetInfo, content: bytes | None, message: str) -> None:
    index = copy.path / "train" / "index.json"
    index.unlink()
    if content is not None:
        index.write_bytes(content)
    with pytest.raises(InputError, match=f"^{index} {message}") as caught:
        TrainingStream(config(copy), 7, 0, 1)
    assert "\n" not in str(caught.value)


def test_the_index_tells_what_was_written(prepared: DatasetInfo) -> None:
    described = json.loads((prepared.path / "train" / "index.json").read_text())["shards"]
    assert all(shard["raw_data"]["hashes"].keys() == {"sha256"} for shard in described)
    assert len(described) > 5
