"""What lies in a folder that DeepSpeed's `engine.save_checkpoint` wrote, by the names of its files."""

import re
from pathlib import Path

from train.errors import RunError

_MODEL = "*_model_states.pt"
_NEWEST = ("latest", "latest_universal")
"""Files that name the newest step: written by the engine, and by the converter to the universal format."""
_OPTIMIZER = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


def find_step(source: Path) -> Path | None:
    """The folder of the step to read: `source` itself, or the newest in it; None where DeepSpeed saved nothing.

    Raises:
        RunError: the newest step isn't named, or not there.
    """
    if is_universal(source) or any(source.glob(_MODEL)):
        return source
    for file in (source / name for name in _NEWEST):
        if file.is_file():
            step = source / file.read_text(errors="replace").strip()
            if not (step.is_dir() and step.resolve().is_relative_to(source.resolve())):
                raise RunError(
                    f"{file} names {step.name}, which isn't there: give the folder of a step that is"
                )
            return step
    steps = sorted(path.parent for path in source.glob(f"*/{_MODEL}"))
    if steps:
        raise RunError(f"{source} has no file `latest`: give the folder of a step, such as {steps[-1]}")
    return None


def is_universal(step: Path) -> bool:
    """Whether it is in the universal format, a folder for each weight."""
    return any((step / "zero").glob("*/fp32.pt"))


def first_model_file(step: Path) -> Path:
    """The file in which the first rank describes the model.

    Raises:
        RunError: it isn't there.
    """
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for name in names:
        if (step / name).is_file():
            return step / name
    raise RunError(f"{step} lacks {' or '.join(names)}: copy the whole folder")


def check_parallel(step: Path) -> None:
    """Raises RunError where weights were cut otherwise than by ZeRO."""
    names = [path.name for path in step.glob("*_states.pt")]
    if any("_expert_" in name or name.startswith("expp_rank_") for name in names):
        raise RunError(
            f"{step} holds experts of DeepSpeed's own layers, which no architecture of transformers has"
        )
    if any(name.startswith("layer_") for name in names):
        raise RunError(
            f"{step} is of a pipeline, whose weights have no names of transformers: save a model of transformers"
        )
    for name in names:
        if (found := re.search(r"mp_rank_(\d+)", name)) and int(found[1]) > 0:
            raise cut_by_tensor_parallelism(step, name)


def cut_by_tensor_parallelism(step: Path, sign: str) -> RunError:
    """The refusal of a checkpoint, and by what it is known."""
    return RunError(
        f"{step} is tensor-parallel ({sign}): let DeepSpeed put it together, by `python -m "
        f"deepspeed.checkpoint.ds_to_universal --input_folder {step} --output_folder {step}_universal`, and import that"
    )


def optimizer_prefix(step: Path) -> str:
    """What the names of the optimizer's files begin with, by the precision.

    Raises:
        RunError: there are none, or two checkpoints lie in one folder.
    """
    prefixes = sorted({found[1] for path in step.iterdir() if (found := _OPTIMIZER.fullmatch(path.name))})
    if not prefixes:
        raise RunError(
            f"{step} lacks zero_pp_rank_0_mp_rank_00_optim_states.pt: the fp32 weights are in the "
            f"*_optim_states.pt of all ranks: copy these too"
        )
    if len(prefixes) > 1:
        raise RunError(
            f"{step} has two checkpoints in it ({prefixes[0]}zero_* and {prefixes[1]}zero_*): leave one"
        )
    return prefixes[0]


def rank_file(step: Path, kind: str, rank: int, prefix: str = "") -> Path:
    """One rank's file of a kind (`optim`, `model`).

    Raises:
        RunError: it isn't there.
    """
    path = step / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
    if not path.is_file():
        raise RunError(f"{step} lacks {path.name}: copy it from the node of rank {rank}")
    return path
