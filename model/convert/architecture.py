"""What an architecture of Hugging Face's is made of, and moving weights by such a description."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.build import build_model
from model.config import ModelConfig
from model.errors import ConversionError


@dataclass(frozen=True)
class Layer:
    """One layer of theirs, with `{i}` for the block's number and `{x}` for an expert's.

    Its weight (and bias) is that of our layers, their outputs one after another; `transposed`: stored (in, out).
    With `{x}` in it, our one tensor holds the experts' weights stacked. `scale`: ours over theirs. `holds`: the models
    that have the layer, where not all do.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    scale: Callable[[ModelConfig], float] = lambda config: 1.0
    holds: Callable[[ModelConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Architecture:
    """One of Hugging Face's model classes."""

    model_type: str
    """As in config.json."""
    class_name: str
    layers: tuple[Layer, ...]
    to_ours: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json to our `model` section. Raises ConversionError where ours can't hold it."""
    to_theirs: Callable[[ModelConfig], dict[str, Any]]
    """Ours to config.json, as far as it goes; whether it holds everything is found by coming back."""


def import_weights(
    architecture: Architecture, config: ModelConfig, theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Their tensors under our names.

    Raises:
        ConversionError: a tensor is missing or of another shape.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}
    ours: dict[str, Tensor] = {}
    for layer, i, kind in _places(architecture, config, shapes):
        names = [part.format(i=i) + kind for part in layer.ours]
        if not all(name in shapes for name in names):
            continue
        whole = _read(layer, i, kind, theirs, config)
        if layer.transposed and kind == ".weight":
            whole = whole.t()
        if (scale := layer.scale(config)) != 1:
            whole = whole * scale
        sizes = [shapes[name][0] for name in names]
        if whole.shape != (sum(sizes), *shapes[names[0]][1:]):
            wanted = (sum(sizes), *shapes[names[0]][1:])
            raise ConversionError(
                f"{layer.theirs.format(i=i, x=0)}{kind} is {tuple(whole.shape)}, not {wanted}"
            )
        for name, part in zip(names, whole.split(sizes), strict=True):
            ours[name] = part.contiguous()
    if missing := shapes.keys() - ours.keys():
        raise ConversionError(f"{architecture.class_name} has no weights for {sorted(missing)[0]}")
    return ours


def export_weights(
    architecture: Architecture, config: ModelConfig, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors under their names, for a configuration that the architecture holds."""
    theirs: dict[str, Tensor] = {}
    for layer, i, kind in _places(architecture, config, ours):
        names = [part.format(i=i) + kind for part in layer.ours]
        if not all(name in ours for name in names):
            continue
        whole = torch.cat([ours[name] for name in names])
        if "{x}" in layer.theirs:
            for x, expert in enumerate(whole):
                theirs[layer.theirs.format(i=i, x=x) + ".weight"] = expert.contiguous()
            continue
        if layer.transposed and kind == ".weight":
            whole = whole.t()
        if (scale := layer.scale(config)) != 1:
            whole = whole / scale
        theirs[layer.theirs.format(i=i) + kind] = whole.contiguous()
    return theirs


def _places(
    architecture: Architecture, config: ModelConfig, names: Iterable[str]
) -> list[tuple[Layer, int, str]]:
    """Every layer of theirs in every block, with the ending of each parameter it may have; names: ours, of all."""
    places = []
    for layer in architecture.layers:
        if not layer.holds(config):
            continue
        before, has_blocks, _ = layer.ours[0].partition("{i}")
        blocks = {name[len(before) :].partition(".")[0] for name in names if name.startswith(before)}
        for i in range(len(blocks) if has_blocks else 1):
            kinds = ("",) if "{x}" in layer.theirs else (".weight", ".bias")
            places += [(layer, i, kind) for kind in kinds]
    return places


def _read(layer: Layer, i: int, kind: str, theirs: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    try:
        if "{x}" not in layer.theirs:
            return theirs[layer.theirs.format(i=i) + kind]
        assert config.moe is not None
        names = [layer.theirs.format(i=i, x=x) + ".weight" for x in range(config.moe.num_experts)]
        return torch.stack([theirs[name] for name in names])
    except KeyError as error:
        raise ConversionError(f"there is no tensor {error}") from None
