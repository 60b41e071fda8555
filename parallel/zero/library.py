"""DeepSpeed itself: loading it, and what it says."""

import importlib.util
import logging
import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from parallel.errors import LayoutError

if TYPE_CHECKING:
    import torch


def check_installed() -> None:
    """Raises LayoutError where DeepSpeed isn't there. It isn't loaded for that."""
    if importlib.util.find_spec("deepspeed") is None:
        raise LayoutError(
            "parallel.engine=deepspeed, but DeepSpeed isn't installed: pip install 'trireme[deepspeed]', or use "
            "parallel.engine=torch"
        )


def load(device: "torch.device") -> ModuleType:
    """DeepSpeed for a kind of device, with its messages in this process's log.

    Its operator for collectives through shared memory is left out: it would be compiled at the first start, in which
    every later start waits for ever where that was killed once, and gloo does the same.

    Raises:
        LayoutError: it can't be loaded.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device.type == "cpu" else "cuda")
    check_installed()
    try:
        import deepspeed
    except (ImportError, RuntimeError, OSError) as error:
        raise LayoutError(
            f"parallel.engine=deepspeed: DeepSpeed can't be loaded ({error}): mend its installation, or use "
            f"parallel.engine=torch"
        ) from None
    # of its use of torch, once for every collective
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)
    messages = logging.getLogger("DeepSpeed")
    messages.handlers.clear()
    messages.propagate = True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
