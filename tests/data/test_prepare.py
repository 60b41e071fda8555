"""A prepared data set holds every token once, whoever wrote it and however often it was interrupted."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import data.parts
import data.prepare
from data.corpus import documents
from data.dataset import DatasetInfo, open_dataset
from data.errors import InputError
from data.parts import SequenceWriter, place, write_part
from data.prepare import prepare
from data.sources import cut, find_files
from data.tokenizer import Tokenizer
from tests.data.conftest import OPTIONS


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path, split: str) -> Iterator[np.ndarray]:
    """The samples, read by nothing but the format: count, offsets, header, rows."""
    for shard in json.loads((folder / split / "index.json").read_text())["shards"]:
        content = (folder / split / shard["raw_data"]["basename"]).read_bytes()
        count = int.from_bytes(content[:4], "little")
        offsets = np.frombuffer(content, np.uint32, count + 1, 4)
        for begin, end in itertools.pairwise(offsets):
            yield np.frombuffer(content[begin:end], np.uint16)


def test_every_token_is_a_target_once(prepared: DatasetInfo, texts: Path) -> None:
    tokenizer = Tokenizer.load(prepared.tokenizer_path)
    wanted: dict[str, list[int]] = {"train": [], "validation": []}
    counted = {"train": 0, "validation": 0}
    for document in documents(cut(find_files([str(texts)]), 1 << 20)):
        split = "validation" if place(document.key) < 0.2 else "train"
        wanted[split] += [*tokenizer.encode(document.text), tokenizer.eos_id]
        counted[split] += 1
    for split, tokens in wanted.items():
        samples = list(rows(prepared.path, split))
        assert {len(sample) for sample in samples} == {prepared.seq_len + 1}
        targets = np.concatenate([sample[1:] for sample in samples])
        assert targets[targets != prepared.pad_id].tolist() == tokens
        inputs = np.concatenate([sample[:-1] for sample in samples])
        assert (inputs[1:] == targets[:-1]).sum() > 0.9 * len(targets)
        info = getattr(prepared, split)
        assert (info.documents, info.tokens, info.sequences) == (counted[split], len(tokens), len(samples))


def test_samples_overlap_by_one_token_within_a_part(prepared: DatasetInfo) -> None:
    tokenizer = Tokenizer.load(prepared.tokenizer_path)
    before = None
    for sample in rows(prepared.path, "train"):
        assert sample[0] in (before, tokenizer.eos_id)
        before = sample[-1]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    large = cast(Tokenizer, SimpleNamespace(vocab_size=70_000, eos_id=3, pad_id=0))
    writer = SequenceWriter(tmp_path / "x", 4, large)
    writer.add([69_999] * 5, 5)
    assert writer.finish().sequences == 2
    shard = (tmp_path / "x" / "shard.00000.mds").read_bytes()
    assert np.frombuffer(shard[-40:], np.uint32).tolist() == [3, *[69_999] * 4, 69_999, 69_999, 3, 0, 0]


def test_any_number_of_workers_writes_the_same(prepared: DatasetInfo, texts: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "two"
    report = prepare([str(texts)], out, workers=2, progress=lambda *told: seen.append(told), **OPTIONS)
    assert tree(out) == tree(prepared.path)
    assert len(list((out / "train").glob("part-*"))) > 5
    size = sum(path.stat().st_size for path in texts.rglob("*.txt"))
    assert seen[0] == ("tokenizer", 0, size) and seen[-1] == ("tokens", size, size)
    assert report.documents == 60
    assert report.tokens == prepared.train.tokens + prepared.validation.tokens
    assert report.bytes_per_token == size / report.tokens
    assert report.tokens_per_second > 0


DIES = """
import os, signal, sys
import data.parts
from data.prepare import prepare
from tests.data.conftest import OPTIONS
to_disk, left = data.parts._to_disk, [7]
def dies(folder):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    to_disk(folder)
data.parts._to_disk = dies
prepare([sys.argv[1]], sys.argv[2], workers=1, **OPTIONS)
"""


def test_a_killed_call_goes_on_where_it_was(
    prepared: DatasetInfo, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", DIES, texts, out], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    finished = {path.stem for path in (out / "unfinished").glob("part-*.json")}
    assert finished
    assert list((out / "unfinished").rglob("*.mds")), "it was in the middle of a part"
    with pytest.raises(InputError, match=r"is unfinished.*trireme prepare"):
        open_dataset(out)
    with pytest.raises(InputError, match=r"unfinished data set of another seq len.*rm -r"):
        prepare([str(texts)], out, workers=1, **(OPTIONS | {"seq_len": 17}))

    written = []
    monkeypatch.setattr(
        data.prepare, "write_part", lambda part: written.append(part.name) or write_part(part)
    )
    prepare([str(texts)], out, workers=1, **OPTIONS)
    assert not finished & set(written)
    assert tree(out) == tree(prepared.path)


def test_a_part_killed_between_its_renames_is_written_again(
    prepared: DatasetInfo, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"

    def dies(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.parts, "write_json", dies)
        prepare([str(texts)], out, workers=1, **OPTIONS)
    assert (out / "train" / "part-00000").exists()
    prepare([str(texts)], out, workers=1, **OPTIONS)
    assert tree(out) == tree(prepared.path)


def test_a_full_disk_is_told_and_nothing_is_lost(
    prepared: DatasetInfo, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "full"
    left = [4]

    def full(part: data.parts.Part) -> data.parts.PartReport:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_part(part)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"no space is left.*same command"):
        patch.setattr(data.prepare, "write_part", full)
        prepare([str(texts)], out, workers=1, **OPTIONS)
    assert len(list((out / "unfinished").glob("part-*.json"))) == 3
    prepare([str(texts)], out, workers=1, **OPTIONS)
    assert tree(out) == tree(prepared.path)


ORPHAN = """
import multiprocessing, time
from data.prepare import _end_with_parent
def sleeps():
    _end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(100)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=sleeps).start()
    time.sleep(100)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while _lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_nothing_is_overwritten(prepared: DatasetInfo, texts: Path, tmp_path: Path) -> None:
    before = tree(prepared.path)
    with pytest.raises(InputError, match=r"already holds a data set: choose another --out"):
        prepare([str(texts)], prepared.path, **OPTIONS)
    assert tree(prepared.path) == before
    roundabout = tmp_path / "missing" / ".." / ".." / prepared.path.relative_to(tmp_path.parent)
    with pytest.raises(InputError, match="already holds a data set"):
        prepare([str(texts)], roundabout, **OPTIONS)
    assert not (tmp_path / "missing").exists()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"can't be made \(Not a directory\): choose another --out"):
        prepare([str(texts)], tmp_path / "mine.txt" / "set", **OPTIONS)
    with pytest.raises(InputError, match="holds other things"):
        prepare([str(texts)], tmp_path, **OPTIONS)
    assert tree(tmp_path) == {"mine.txt": b"mine"}


def test_two_calls_at_once(texts: Path, tmp_path: Path) -> None:
    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(InputError, match="being prepared by another process"):
            prepare([str(texts)], tmp_path / "x", workers=1, **OPTIONS)

    prepare([str(texts)], tmp_path / "x", workers=1, progress=second, **OPTIONS)


@pytest.mark.parametrize("name", ["moved", "a#b?c d%20é"])
def test_the_folder_can_be_moved_and_named_as_one_likes(
    prepared: DatasetInfo, tmp_path: Path, name: str
) -> None:
    from data.stream import validation_batches

    shutil.copytree(prepared.path, tmp_path / name)
    info = open_dataset(tmp_path / name)
    assert info.digest == prepared.digest
    assert len(list(validation_batches(str(tmp_path / name), 1, 0, 1))) == info.validation.sequences


def test_the_merged_index_is_the_one_that_streaming_makes(prepared: DatasetInfo, tmp_path: Path) -> None:
    from streaming.base.util import merge_index

    shutil.copytree(prepared.path / "train", tmp_path / "train")
    ours = json.loads((tmp_path / "train" / "index.json").read_text())
    (tmp_path / "train" / "index.json").unlink()
    merge_index(str(tmp_path / "train"))
    assert json.loads((tmp_path / "train" / "index.json").read_text()) == ours


def write_rows(path: Path, count: int) -> str:
    lines = [json.dumps({"text": f"document {i} about a boat with {i} oars"}) for i in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("fraction", "empty"), [(1e-6, "validation"), (1 - 1e-6, "train")])
def test_an_empty_split_is_told_with_a_fraction_that_works(
    tmp_path: Path, fraction: float, empty: str, given: bool
) -> None:
    source = write_rows(tmp_path / "x.jsonl", 5)
    options: dict[str, Any] = {"vocab_size": 283, "seq_len": 8, "workers": 1}
    model = data.prepare.train(["a boat with oars about\n"] * 20, 283)
    if given:
        (tmp_path / "given.model").write_bytes(model)
        options["tokenizer"] = tmp_path / "given.model"
    with pytest.raises(InputError, match=f"none of the 5 documents falls into the {empty}") as caught:
        prepare([source], tmp_path / "out", validation_fraction=fraction, **options)
    better = float(re.search(r"set it to ([\d.]+)", str(caught.value))[1])
    info = prepare([source], tmp_path / "out", validation_fraction=better, **options).dataset
    assert getattr(info, empty).documents == 1
    assert (info.tokenizer_path.read_bytes() == model) == given


def test_bad_options_and_corpora(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "one.txt").write_text("a boat with oars\n" * 50)
    bad: list[tuple[Path, dict[str, Any], str]] = [
        (texts, {"seq_len": 0}, "--seq-len 0"),
        (texts, {"validation_fraction": 1.0}, "--validation-fraction 1.0"),
        (texts, {"workers": 0}, "--workers 0"),
        (texts, {"vocab_size": 50_000}, "more than the corpus supports: set --vocab-size to at most"),
        (texts, {"tokenizer": tmp_path / "none.model"}, "none.model can't be read"),
        (texts, {"tokenizer": tmp_path / "one.txt"}, "one.txt is no sentencepiece model"),
        (tmp_path / "empty.txt", {}, "holds no text"),
        (tmp_path / "latin.txt", {}, r"latin\.txt is not UTF-8"),
        (
            tmp_path / "one.txt",
            {"vocab_size": 275, "validation_fraction": 0.01},
            "a single document.*split -l",
        ),
        (
            tmp_path / "one.txt",
            {"vocab_size": 275, "validation_fraction": 0.99},
            "a single document.*split -l",
        ),
    ]
    for source, options, message in bad:
        with pytest.raises(InputError, match=message):
            prepare([str(source)], out, **(OPTIONS | {"workers": 1} | options))
    # none of them stands in the way of the next
    prepare([str(texts)], out, **(OPTIONS | {"workers": 1}))


def test_the_command(texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from train.cli import main; main()", "prepare"]
    command += [
        "--source",
        texts,
        "--out",
        tmp_path / "set",
        "--vocab-size",
        "320",
        "--seq-len",
        "16",
        "--workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"60 documents, [\d,]+ tokens .* bytes/token, [\d,]+ tokens/s", done.stdout)
    assert f"data.path={tmp_path / 'set'}" in done.stdout
    assert open_dataset(tmp_path / "set").seq_len == 16
    again = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
