"""The average of several checkpoints' weights, as a run that other commands take."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint_folder import Progress, complete, find_damage, step_of
from train.commit import begin, commit, place
from train.config import Config
from train.errors import RunError, of_disk
from train.run_folder import RunFolder, make_folder, open_run, to_yaml, vocabulary_files
from train.stored import Stored
from train.tensor_files import Piece, write_tensors

_WEIGHTS = "model."


def average_run(run: str, out: Path, steps: Sequence[int] = (), last: int | None = None) -> list[int]:
    """Make the run `out` of the mean of a run's weights at several steps; its checkpoint is of step 0.

    A tensor is summed up in float64, and only one is in memory at a time (twice: the sum, and what is added).

    steps: of the checkpoints; left out, the `last` ones, or all.
    Returns the steps.

    Raises:
        RunError: no such run, one of the checkpoints is missing, damaged or of another model, or `out` exists.
    """
    folder, config = open_run(run)
    chosen = _choose(run, complete(folder.checkpoints), steps, last)
    for path in chosen:
        if damage := find_damage(path):
            raise RunError(f"{path} is damaged: {damage}: leave step {step_of(path)} out")
    stored = [Stored(path) for path in chosen]
    pieces = _pieces(chosen, stored)
    make_folder(out)
    try:
        _write(RunFolder(out), folder, config, pieces, stored)
    except OSError as error:
        raise of_disk(f"{out}: not written", error) from None
    return [step_of(path) for path in chosen]


def _choose(run: str, found: list[Path], steps: Sequence[int], last: int | None) -> list[Path]:
    there = {step_of(path): path for path in found}
    missing = [step for step in steps if step not in there]
    if missing or not there:
        has = ", ".join(map(str, there)) or "none"
        raise RunError(f"{run} has no checkpoint of step {', '.join(map(str, missing)) or '1'}: it has {has}")
    if last is not None and last > len(found):
        raise RunError(f"{run} has {len(found)} checkpoints, not {last}: use --last {len(found)}")
    return [there[step] for step in sorted(set(steps))] if steps else found[-(last or len(found)) :]


def _pieces(paths: list[Path], stored: list[Stored]) -> list[Piece]:
    """The weights, which are the same in all of them but for their values."""
    ours, *others = [
        {name: fact for name, fact in each.facts.items() if name.startswith(_WEIGHTS)} for each in stored
    ]
    for path, theirs in zip(paths[1:], others, strict=True):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                told = [_told(facts.get(name)) for facts in (ours, theirs)]
                raise RunError(
                    f"{name} is {told[0]} in {paths[0]}, and {told[1]} in {path}: average checkpoints of one model"
                )
    return [Piece(name, dtype, shape, (0,) * len(shape)) for name, (shape, dtype) in ours.items()]


def _told(fact: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if fact is None else f"{fact[1]} of {fact[0]}"


def _write(
    out: RunFolder, source: RunFolder, config: Config, pieces: list[Piece], stored: list[Stored]
) -> None:
    run = config.run.model_copy(update={"name": out.path.name, "dir": str(out.path.parent)})
    out.config.write_text(to_yaml(config.model_copy(update={"run": run})))
    for file in vocabulary_files(source):
        shutil.copyfile(file, out.path / file.name)
    final = place(out.checkpoints, 0)
    written = write_tensors(begin(final) / "average.safetensors", pieces, partial(_mean, stored))
    commit(final, [written], Progress(step=0, tokens=0, data={}), {"world_size": 1})


def _mean(stored: list[Stored], piece: Piece) -> Tensor:
    """Of a tensor's values. Raises RunError where they are no real numbers, and differ."""
    first = stored[0].read(piece.name)
    if not piece.dtype.is_floating_point:
        if any(not torch.equal(first, each.read(piece.name)) for each in stored[1:]):
            raise RunError(f"{piece.name} is {piece.dtype} and differs: it can't be averaged")
        return first
    total = first.double()
    for each in stored[1:]:
        total += each.read(piece.name)
    return (total / len(stored)).to(piece.dtype)
