"""The fp32 weights of a checkpoint of DeepSpeed's, whatever its ZeRO stage and number of ranks.

A checkpoint has a description of the model (`*_model_states.pt`: names and shapes in the order of the optimizer's
groups, which weights are shared, which are frozen), and for each rank its part of the optimizer's state, with the fp32
weights as flat tensors. Under ZeRO 1 and 2 a group's weights stand one after another in one flat tensor, which is cut
into as many parts as there are ranks. Under ZeRO 3 each weight is, with padding, cut into parts of equal length, and a
rank has its parts of all weights one after another. The optimizer's moments are in the same files, and aren't read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from train.deepspeed_checkpoint.folder import (
    check_parallel,
    cut_by_tensor_parallelism,
    first_model_file,
    is_universal,
    optimizer_prefix,
    rank_file,
)
from train.deepspeed_checkpoint.loading import Loaded, checked, load, load_dict, module_weights
from train.deepspeed_checkpoint.pieces import Row, Stored, Weights, elements, whole
from train.deepspeed_checkpoint.replicated import replicated_weights
from train.errors import RunError

Shapes = dict[str, tuple[int, ...]]


def read_weights(step: Path) -> Weights:
    """Of the folder of a step, or of one in the universal format.

    Raises:
        RunError: a file is missing, damaged, unsafe or of other sizes, or the weights were cut otherwise than by ZeRO.
    """
    universal = is_universal(step)
    if not universal:
        check_parallel(step)
    model = load_dict(first_model_file(step))
    if universal:
        stored = _universal(step, _trained_shapes(model))
    else:
        if model.values.get("mp_world_size", 1) != 1:
            raise cut_by_tensor_parallelism(step, f"mp_world_size={model.values['mp_world_size']}")
        stored = replicated_weights(model) if model.values.get("param_shapes") is None else _zero(step, model)
    stored = _untrained(step, model) | stored
    shared = model.entry("shared_params", dict) if model.values.get("shared_params") else {}
    for name, same in shared.items():
        if same in stored:
            stored[name] = stored[same]
    return Weights(stored)


def _zero(step: Path, model: Loaded) -> dict[str, Stored]:
    """The trained weights under ZeRO 1, 2 and 3."""
    prefix = optimizer_prefix(step)
    first = load_dict(rank_file(step, "optim", 0, prefix)).inner("optimizer_state_dict")
    ranks = _count(first)
    others = (load_dict(rank_file(step, "optim", rank, prefix)) for rank in range(1, ranks))
    states = [first, *(file.inner("optimizer_state_dict") for file in others)]
    left = step / f"{prefix}zero_pp_rank_{ranks}_mp_rank_00_optim_states.pt"
    for state in states:
        if _count(state) != ranks:
            raise RunError(
                f"{state.path} is of {_count(state)} ranks, {first.path.name} of {ranks}: not of one save"
            )
    if left.exists():
        raise RunError(
            f"{left} is of another save, since {first.path.name} is one of {ranks}: remove what is older"
        )
    if "fp32_flat_groups" in first.values:
        return _by_weight(_trained_shapes(model), states)
    return _by_group(_groups(model), states)


def _count(state: Loaded) -> int:
    """Over how many ranks the optimizer's state is cut."""
    counts = state.values.get("partition_count")
    count = max(counts, default=0) if isinstance(counts, list) else counts
    if not isinstance(count, int) or count < 1:
        raise RunError(f"{state.path}: partition_count={counts}: it is not a file as DeepSpeed saves it")
    return count


def _by_group(groups: list[Shapes], states: list[Loaded]) -> dict[str, Stored]:
    """ZeRO 1 and 2."""
    parts = [_flat_tensors(state, "single_partition_of_fp32_groups", len(groups)) for state in states]
    gaps = _gaps(states[0], groups)
    stored = {}
    for number, shapes in enumerate(groups):
        row, at = Row([part[number] for part in parts]), 0
        for (name, shape), gap in zip(shapes.items(), gaps[number], strict=True):
            stored[name] = Stored(shape, row.cut(at, elements(shape)))
            at += elements(shape) + gap
        if not 0 <= len(row) - at < 2 * len(states):  # groups are padded to twice the ranks
            raise _do_not_add_up(states[0].path, len(row), at)
    return stored


def _gaps(state: Loaded, groups: list[Shapes]) -> list[list[int]]:
    """Elements of padding behind each weight; there are some where DeepSpeed was asked to align weights."""
    if "param_alignment_paddings" not in state.values:
        return [[0] * len(shapes) for shapes in groups]
    gaps = state.entry("param_alignment_paddings", list)
    if [len(gap) for gap in gaps] != [len(shapes) for shapes in groups]:
        raise RunError(
            f"{state.path}: its groups have other weights than the model: the files aren't of one save"
        )
    return gaps


def _by_weight(shapes: Shapes, states: list[Loaded]) -> dict[str, Stored]:
    """ZeRO 3."""
    rows = [Row(_flat_tensors(state, "fp32_flat_groups")) for state in states]
    stored, at = {}, 0
    for name, shape in shapes.items():
        size = elements(shape)
        share = -(-size // len(rows))
        pieces = [
            row.cut(at, min(share, size - rank * share))
            for rank, row in enumerate(rows)
            if rank * share < size
        ]
        stored[name] = Stored(shape, tuple(piece for pieces_of_rank in pieces for piece in pieces_of_rank))
        at += share
    for state, row in zip(states, rows, strict=True):
        if len(row) != at:
            raise _do_not_add_up(state.path, len(row), at)
    return stored


def _do_not_add_up(path: Path, there: int, wanted: int) -> RunError:
    return RunError(
        f"{path}: {there} elements where the model's weights take {wanted}: the files aren't of one save"
    )


def _flat_tensors(state: Loaded, key: str, count: int | None = None) -> list[Tensor]:
    tensors = [checked(state.path, tensor).flatten() for tensor in state.entry(key, list)]
    if count is not None and len(tensors) != count:
        raise RunError(
            f"{state.path}: {len(tensors)} groups where the model has {count}: the files aren't of one save"
        )
    return tensors


def _groups(model: Loaded) -> list[Shapes]:
    """Names and shapes of the trained weights in each of the optimizer's groups."""
    groups = model.entry("param_shapes", list)
    if not all(isinstance(group, dict) for group in groups):
        raise RunError(
            f"{model.path}: param_shapes are no dictionaries: it is not a file as DeepSpeed saves it"
        )
    return [_shapes(model.path, group) for group in groups]


def _trained_shapes(model: Loaded) -> Shapes:
    if model.values.get("param_shapes") is None:
        return {}
    return {name: shape for group in _groups(model) for name, shape in group.items()}


def _shapes(path: Path, shapes: Mapping[str, Iterable[int]]) -> Shapes:
    for name, shape in shapes.items():
        if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise RunError(f"{path}: {name} has no shape: it is not a file as DeepSpeed saves it")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _untrained(step: Path, model: Loaded) -> dict[str, Stored]:
    """Frozen weights, which no optimizer holds, in the precision of the model; under ZeRO 3 every rank has a part."""
    if not model.path.name.startswith("zero_pp_rank_0"):
        return {name: whole(weight) for name, weight in module_weights(model).items()}
    shapes = _shapes(model.path, model.values.get("frozen_param_shapes") or {})
    if not shapes:
        return {}
    files = [load_dict(rank_file(step, "model", rank)) for rank in range(model.entry("dp_world_size", int))]
    parts = [file.entry("frozen_param_fragments", dict) for file in files]
    stored = {}
    for name, shape in shapes.items():
        row = Row([checked(files[0].path, part.get(name)).flatten() for part in parts])
        if len(row) < elements(shape):
            raise _do_not_add_up(files[0].path, len(row), elements(shape))
        stored[name] = Stored(shape, row.cut(0, elements(shape)))
    return stored


def _universal(step: Path, shapes: Shapes) -> dict[str, Stored]:
    """A file for each weight: converted from ZeRO 3 flat, otherwise in its shape, in a dictionary."""
    stored = {}
    for path in sorted((step / "zero").glob("*/fp32.pt")):
        name, value = path.parent.name, load(path)
        tensor = checked(path, value.get("param") if isinstance(value, dict) else value)
        shape = tuple(tensor.shape) if isinstance(value, dict) else shapes.get(name, tuple(tensor.shape))
        if tensor.numel() != elements(shape):
            raise _do_not_add_up(path, tensor.numel(), elements(shape))
        stored[name] = Stored(shape, (tensor.flatten(),))
    return stored
