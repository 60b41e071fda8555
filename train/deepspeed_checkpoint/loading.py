"""Files of torch.save, read as data: nothing that stands in them is executed."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from train.errors import RunError

T = TypeVar("T")


class _Ignored:
    """In place of an object of DeepSpeed's that says nothing of the weights."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_STAND_INS: list[Any] = [
    (_Ignored, f"deepspeed.{name}")
    for name in (
        "checkpoint.universal_checkpoint.SubparamShape",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]
"""The classes that DeepSpeed itself saves, each replaced. Beside them there may be tensors and plain values."""
_DAMAGED = (RuntimeError, UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError)
"""What torch raises for files that torch.save didn't write, or not to the end."""


@dataclass(frozen=True)
class Loaded:
    """A file's dictionary, or one inside it."""

    path: Path
    values: dict[str, Any]

    def entry(self, key: str, kind: type[T]) -> T:
        """A value.

        Raises:
            RunError: it isn't there, or of another kind.
        """
        value = self.values.get(key)
        if not isinstance(value, kind):
            raise RunError(
                f"{self.path}: {key} is no {kind.__name__}: it is not a file as DeepSpeed saves it"
            )
        return value

    def inner(self, key: str) -> "Loaded":
        """A dictionary inside of this one. Raises RunError like `entry`."""
        return Loaded(self.path, self.entry(key, dict))


def load(path: Path) -> Any:
    """What is in a file; its tensors stay on the disk until they are read.

    Raises:
        RunError: it can't be read, is damaged, or holds an object of a class that isn't known to be harmless.
    """
    try:
        with safe_globals(_STAND_INS):
            unknown = sorted(get_unsafe_globals_in_checkpoint(path))
            if unknown:
                raise RunError(
                    f"{path} holds {unknown[0]}, and reading that could run code: save without it, or if you trust "
                    f"the file, let the zero_to_fp32.py beside it write safetensors, and import these"
                )
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"{path} is damaged, or not of torch.save: {reason}: copy the checkpoint again"
        ) from None


def load_dict(path: Path) -> Loaded:
    """As `load`, of a file that holds a dictionary."""
    value = load(path)
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no dictionary: it is not a file as DeepSpeed saves it")
    return Loaded(path, value)


def checked(path: Path, tensor: object) -> Tensor:
    """A value of a file that must be an ordinary tensor, which takes no more memory than the file.

    Raises:
        RunError: it is something else.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    ):
        return tensor.detach()
    raise RunError(
        f"{path}: what should be weights is no plain tensor: it is not a file as DeepSpeed saves it"
    )


def module_weights(model: Loaded) -> dict[str, Tensor]:
    """The model's own weights, in its precision. Raises RunError where they aren't there."""
    buffers = model.entry("buffer_names", list)
    module = model.entry("module", dict)
    return {name: checked(model.path, tensor) for name, tensor in module.items() if name not in buffers}
