"""What each block keeps for its backward, measured on a twin of the model before anything is allocated.

B batch, T sequence.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.activation_checkpoint import Recompute, named_layers, recomputing
from parallel.build import Blueprint, Built
from parallel.context import Context, at_work
from parallel.pipeline import Stage

KeptBytes = Mapping[str, Mapping[Recompute, int]]
"""Bytes that a layer, by its name, keeps for its backward with each way of recomputing."""


class AllMeasured(Exception):
    """The last layer has been measured: what comes after is of no interest."""


class _Made(TorchDispatchMode):
    """Notes the memory that operators make, and which of it lives on."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = operator(*args, **(kwargs or {}))
        taken = _storages((args, kwargs))
        for storage, size in _storages(output).items():
            if storage not in taken:
                self._sizes[storage] = size
        return output

    def alive(self, besides: Any) -> int:
        """Bytes that are still held, without those of the tensors `besides`."""
        others = _storages(besides)
        return sum(
            size for storage, size in self._sizes.items() if storage not in others and not storage.expired()
        )


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def measure(blueprint: Blueprint, dtype: torch.dtype, micro_batch: tuple[int, int]) -> KeptBytes:
    """What this rank's layers keep of a micro-batch of (B, T), whole sequences, of activations in a dtype.

    Nothing is computed. Experts of other ranks are supposed to be sent as many tokens as one's own.
    """
    kept: dict[str, Mapping[Recompute, int]] = {}
    for stage in blueprint.stages:
        built = blueprint.build(stage, dtype)
        with FakeTensorMode(), torch.device(blueprint.mesh.device_type):
            _imagine(built.model)
            step = functools.partial(_step, built, blueprint.context, dtype, *micro_batch)
            kept |= measure_layers(named_layers(built.model), step)
    return kept


def _imagine(model: nn.Module) -> None:
    """Take weights and buffers to be where the model will compute."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _step(built: Built, context: Context | None, dtype: torch.dtype, batch: int, length: int) -> None:
    model, root = built.model, built.root
    targets = torch.zeros(batch, length, dtype=torch.int64)
    inputs = model.example(batch, length)
    with at_work(context, length) as part:
        if not isinstance(root, Stage):
            model.loss_sum(**inputs, targets=targets, **part)
            return
        shape = batch, *root.activation(length)
        x = targets if root.is_first else torch.zeros(shape, dtype=dtype, requires_grad=True)
        root(x, targets, **inputs)


def measure_layers(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> KeptBytes:
    """Measure layers while `run` goes through all of them in order; of each kind of layer only the first computes.

    A layer's input counts with it, its output with who takes it; weights, and what all layers are given alike
    (masks, rotations, an encoder's output), count with none.
    """
    kept: dict[str, Mapping[Recompute, int]] = {}
    kinds: dict[tuple[str, torch.Size], tuple[Mapping[Recompute, int], Any]] = {}
    plain = {name: layer.forward for name, layer in layers.items()}

    def measuring(name: str, x: Tensor, *args: Any) -> Any:
        kind = repr(layers[name]), x.shape
        if kind not in kinds:
            kinds[kind] = _measured(plain[name], x, *args)
        kept[name], output = kinds[kind]
        if len(kept) == len(layers):
            raise AllMeasured
        return output

    for name, layer in layers.items():
        layer.forward = functools.partial(measuring, name)
    try:
        run()
    except AllMeasured:
        pass
    finally:
        for name, layer in layers.items():
            layer.forward = plain[name]
    return kept


def _measured(forward: Callable[..., Any], x: Tensor, *args: Any) -> tuple[Mapping[Recompute, int], Any]:
    """What is kept, and the output."""
    kept: dict[Recompute, int] = {}
    for recompute in get_args(Recompute):
        with _Made() as made:
            output = recomputing(forward, recompute)(x, *args)
        states = output[0] if isinstance(output, tuple) else output
        kept[recompute] = x.untyped_storage().nbytes() + made.alive(besides=states)
    return kept, output
