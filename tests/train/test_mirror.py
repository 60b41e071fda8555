"""A second place for checkpoints: whole ones alone, kept by the run's rules, brought back when the first is lost."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from tests.train.test_run import refusal_to_train
from train.checkpoint_compare import compare
from train.checkpoint_folder import MANIFEST, Progress, complete, digest, step_of
from train.commit import begin, commit, place
from train.config import CheckpointConfig
from train.config_file import load_config
from train.errors import ConfigError, RunError
from train.mirror import Mirror
from train.resolve import resolve
from train.retention import prune
from train.run_folder import RunFolder, to_yaml
from train.tensor_files import Piece, write_tensors


@pytest.fixture(params=["folder", "store"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A mirror's place: a folder, and a store of objects that knows no folders."""
    yield str(tmp_path / "mirror") if request.param == "folder" else f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def run(tiny_config: str, tmp_path: Path) -> RunFolder:
    """A run without checkpoints."""
    folder = RunFolder(tmp_path / "here" / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.config.write_text(to_yaml(load_config(tiny_config, []).config))
    return folder


def save(run: RunFolder, step: int, validation_loss: float | None = None) -> Path:
    """A checkpoint of two files."""
    final, values = place(run.checkpoints, step), torch.full((3,), float(step))
    aside = begin(final)
    piece = Piece("model.a", values.dtype, (3,), (0,))
    files = [write_tensors(aside / f"{name}.safetensors", [piece], lambda _: values) for name in "ab"]
    progress = Progress(step, step * 10, {}, validation_loss=validation_loss)
    commit(final, files, progress, {})
    return final


def mirror_of(run: RunFolder, url: str, **rules: Any) -> Mirror:
    return Mirror(url, run, CheckpointConfig(**rules))


def accept(run: RunFolder, called: str) -> None:
    """It is the same run."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_copies_what_is_missing_and_brings_back_the_newest(run: RunFolder, url: str) -> None:
    mirror = mirror_of(run, url)
    mirror.start(accept)
    for step in (10, 20):
        save(run, step)
    mirror.update()
    assert mirror.steps() == [10, 20]
    saved = content(run.checkpoints / "step-00000020")
    assert mirror.bring_back(after=20) is None
    shutil.rmtree(run.checkpoints)
    assert mirror.bring_back(after=-1) == run.checkpoints / "step-00000020"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000020"]
    assert content(run.checkpoints / "step-00000020") == saved


def test_mirror_is_listed_no_more_often_for_more_checkpoints(
    run: RunFolder, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, asked = mirror_of(run, url, keep=9), []
    for name in ("ls", "cat_file"):
        call = getattr(mirror._files, name)

        def counted(*arguments: Any, name: str = name, call: Any = call, **options: Any) -> Any:
            asked.append(name)
            return call(*arguments, **options)

        monkeypatch.setattr(mirror._files, name, counted)
    counts = []
    for steps in ((10,), (20,), (30, 40, 50)):
        for step in steps:
            save(run, step)
        asked.clear()
        mirror.update()
        counts.append((asked.count("ls"), asked.count("cat_file")))
    assert mirror.steps() == [10, 20, 30, 40, 50]
    (few, one), (as_few, two) = counts[1:]
    assert few == as_few and (one, two) == (1, 2)


def test_keeps_by_the_rules_of_the_run(run: RunFolder, url: str) -> None:
    mirror = mirror_of(run, url, keep=2, every_steps=10, keep_every=40, keep_best=1)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.4), (60, 2.6)):
        save(run, step, loss)
        mirror.update()
        prune(run.checkpoints, mirror.rules)
    assert mirror.steps() == [20, 40, 50, 60] == [step_of(path) for path in complete(run.checkpoints)]


def test_another_of_the_same_step_takes_its_place(run: RunFolder, url: str) -> None:
    mirror = mirror_of(run, url)
    save(run, 10)
    mirror.update()
    again = content(save(run, 10, validation_loss=1.0))
    mirror.update()
    shutil.rmtree(run.checkpoints)
    mirror.bring_back(after=-1)
    assert content(run.checkpoints / "step-00000010") == again


@pytest.mark.parametrize("left", [0, 1, 2])
def test_half_copied_is_never_taken_and_completed_later(
    run: RunFolder, url: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was copied when it broke off."""
    mirror, copied = mirror_of(run, url), []
    save(run, 10)
    mirror.update()
    save(run, 20)
    put = mirror._files.put_file

    def breaks_off(source: str, target: str) -> None:
        if len(copied) == left:
            raise ConnectionError("gone")
        put(source, target)
        copied.append(target)

    monkeypatch.setattr(mirror._files, "put_file", breaks_off)
    with pytest.raises(ConnectionError):
        mirror.update()
    assert mirror.steps() == [10]
    monkeypatch.undo()
    mirror.update()
    assert mirror.steps() == [10, 20]


def test_damaged_ones_are_passed_over_and_not_spread(
    run: RunFolder, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirror_of(run, url, keep=3)
    for step in (10, 20, 30):
        save(run, step)
    mirror.update()
    shutil.rmtree(run.checkpoints)
    mirror._files.pipe_file(mirror._at(30, "b.safetensors"), b"other")
    mirror._files.rm_file(mirror._at(20, "a.safetensors"))
    assert mirror.bring_back(after=-1) == run.checkpoints / "step-00000010"
    assert "step-00000030 is damaged in the mirror (b.safetensors is not what was written)" in caplog.text
    assert "step-00000020 is damaged in the mirror" in caplog.text
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000010"]
    (save(run, 40) / "a.safetensors").write_bytes(b"other")
    mirror.update()
    assert mirror.steps() == [10, 20, 30]
    assert "step-00000040 is damaged (a.safetensors is not what was written): not copied" in caplog.text


@pytest.mark.parametrize(
    "name", ["../outside", "../../../outside", "../step-00000009", "..", "", ".", "/a", "a\0"]
)
def test_paths_in_a_mirror_stay_in_their_folder(
    run: RunFolder, url: str, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that has a file for whatever it is asked for."""
    mirror = mirror_of(run, url)
    path = save(run, 10)
    (path / "a.safetensors").rename(run.path / "a")
    get = mirror._files.get_file

    def gives(source: str, target: str) -> None:
        if source.endswith(MANIFEST):
            get(source, target)
        elif not Path(target).is_dir():
            shutil.copyfile(run.path / "a", target)

    monkeypatch.setattr(mirror._files, "get_file", gives)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"][name] = manifest["files"]["a.safetensors"]
    mirror._files.makedirs(mirror._at(10), exist_ok=True)
    sealed = json.dumps(manifest | {"sha256": digest(manifest)})
    mirror._files.pipe_file(mirror._at(10, MANIFEST), sealed.encode())
    shutil.rmtree(run.checkpoints)
    before = content(run.path.parent.parent)
    assert mirror.bring_back(after=-1) is None
    assert "is damaged in the mirror" in caplog.text
    assert content(run.path.parent.parent) == before


def test_failure_is_told_and_made_up_for(
    run: RunFolder, url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(run, url)

    def fails(*_: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(mirror._files, "put_file", fails)
    save(run, 10)
    _send_and_wait(mirror)
    assert "is behind: ConnectionError: gone; the next save tries again" in caplog.text
    assert mirror.steps() == []
    monkeypatch.undo()
    save(run, 20)
    _send_and_wait(mirror)
    assert mirror.steps() == [10, 20]
    mirror.close()


def _send_and_wait(mirror: Mirror) -> None:
    mirror.send()
    mirror._jobs[-1].exception(60)
    assert not mirror.busy
    mirror.check()


def test_what_is_being_copied_is_spared(run: RunFolder, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, rules = mirror_of(run, url), CheckpointConfig(keep=1)
    first, put, spared = save(run, 10), mirror._files.put_file, []

    def slow(source: str, target: str) -> None:
        if not spared:
            save(run, 20)
            prune(run.checkpoints, rules, mirror.sending)
            spared.append(first.exists())
        put(source, target)

    monkeypatch.setattr(mirror._files, "put_file", slow)
    mirror.update()
    assert spared == [True] and mirror.sending is None
    assert mirror.steps() == [10, 20]
    prune(run.checkpoints, rules, mirror.sending)
    assert not first.exists()


def test_run_goes_on_from_its_mirror(pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path) -> None:
    common = ["checkpoint.every_steps=1", f"run.dir={tmp_path}"]
    pools[2].run(train_here, tiny_config, [*common, "run.name=whole"])
    mirrored = [*common, f"checkpoint.mirror=file://{tmp_path}/mirror", "checkpoint.asynchronous=true"]
    pools[2].run(train_here, tiny_config, [*mirrored, "run.steps=3"])
    here, there = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "mirror" / "run")
    assert content(there.checkpoints) == content(here.checkpoints)
    assert there.config.is_file() and there.dataset.is_file() and there.tokenizer.is_file()

    shutil.rmtree(here.path)  # gone
    (told,) = [
        lines for lines in pools[2].run(train_and_listen, tiny_config, [*mirrored, "run.steps=5"]) if lines
    ]
    assert f"was gone or damaged: brought back from file://{tmp_path}/mirror/run" in told[0]
    (file, *_) = sorted((here.checkpoints / "step-00000005").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")  # damaged
    pools[2].run(train_here, tiny_config, mirrored)

    assert losses(here.path) == losses(tmp_path / "whole")[3:]
    ends = [complete(RunFolder(tmp_path / name).checkpoints)[-1] for name in ("run", "whole")]
    assert compare(*ends)[1] == []
    other = pools[2].run(refusal_to_train, tiny_config, [*mirrored, f"run.dir={tmp_path}/new", "run.seed=1"])
    assert all("mirror/run was begun with run.seed=0, now it is 1" in error for error in other)


def train_and_listen(config: str, overrides: list[str]) -> list[str]:
    """Train. Returns what was warned of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train").addHandler(handler)
    try:
        train_here(config, overrides)
    finally:
        logging.getLogger("train").removeHandler(handler)
    return said


def test_mirror_that_cannot_be_written_is_refused_at_the_start(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    overrides = [f"run.dir={tmp_path}", f"checkpoint.mirror={tmp_path}/file"]
    for error in pools[2].run(refusal_to_train, tiny_config, overrides):
        assert f"checkpoint.mirror={tmp_path}/file can't be used" in error


@pytest.mark.parametrize(
    ("mirror", "error"),
    [
        ("nope://there", "checkpoint.mirror=nope://there: Protocol not known: nope; a folder works"),
        ("runs/../runs", "is the folder of the runs themselves, run.dir=runs"),
    ],
)
def test_places_that_do_not_work_are_refused(tiny_config: str, mirror: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        resolve(load_config(tiny_config, [f"checkpoint.mirror={mirror}"]), world_size=1)


def test_checkpoint_of_a_newer_format_is_not_passed_over(run: RunFolder, url: str) -> None:
    mirror = mirror_of(run, url)
    save(run, 10)
    mirror.update()
    mirror._files.pipe_file(mirror._at(10, MANIFEST), b'{"format": 99}')
    shutil.rmtree(run.checkpoints)
    with pytest.raises(RunError, match="checkpoint format 99"):
        mirror.bring_back(after=-1)
