"""Checkpoints of ZeRO 0: every rank had the whole model, and the first saved it."""

import torch
from torch import Tensor

from train.deepspeed_checkpoint.loading import Loaded, checked, module_weights
from train.deepspeed_checkpoint.pieces import Row, Stored
from train.errors import RunError


def replicated_weights(model: Loaded) -> dict[str, Stored]:
    """The fp32 weights that an optimizer kept beside a model in 16 bits; none where the model itself is in fp32.

    DeepSpeed saves them without names. Each group of the optimizer has its weights in the order of the model, and each
    weight of the model is what the next of some group rounds to.

    Raises:
        RunError: that doesn't tell them all apart.
    """
    optimizer = model.entry("optimizer", dict) if model.values.get("optimizer") else {}
    masters = optimizer.get("fp32_groups_flat") or optimizer.get("fp32_groups")
    if not masters:
        return {}
    rows = [_row(model, group) for group in masters]
    at = [0] * len(rows)
    stored: dict[str, Stored] = {}
    for name, weight in module_weights(model).items():
        found = [
            (number, candidate)
            for number, row in enumerate(rows)
            if (candidate := _rounds_to(weight, row, at[number])) is not None
        ]
        if len(found) > 1 and not all(
            torch.equal(found[0][1].join(), other.join()) for _, other in found[1:]
        ):
            raise _unnamed(model, name)
        if found:
            number, stored[name] = found[0]
            at[number] += weight.numel()
    if at != [len(row) for row in rows]:
        raise _unnamed(model, "some weights")
    return stored


def _row(model: Loaded, group: object) -> Row:
    """A group: one flat tensor, or a list of the weights."""
    tensors = group if isinstance(group, list) else [group]
    return Row([checked(model.path, tensor).flatten() for tensor in tensors])


def _rounds_to(weight: Tensor, row: Row, at: int) -> Stored | None:
    """The elements of a row from `at` on, where rounded they are the weight."""
    if at + weight.numel() > len(row):
        return None
    candidate = Stored(tuple(weight.shape), row.cut(at, weight.numel()))
    return candidate if torch.equal(candidate.join().to(weight.dtype), weight) else None


def _unnamed(model: Loaded, name: str) -> RunError:
    return RunError(
        f"{model.path}: ZeRO 0 saves fp32 weights without names, and {name} can't be told from others: go on from it "
        f"under ZeRO 1, save, and import that"
    )
