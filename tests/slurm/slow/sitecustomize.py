"""On a job's path: training steps take STEP_SECONDS more each, until the file SLOW_UNTIL is there, if one is named.

One step waits for the file HOLD_UNTIL, in every rank, or in HOLD_RANK alone. A process whose device stands in the
file BROKEN_DEVICES dies at once.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HELD_STEP = 8


class _SlowSteps(importlib.abc.MetaPathFinder):
    """Finds train.trainer, and changes its step once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only of that module."""
        if fullname != "train.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_slow_down(module: ModuleType) -> None:
            load(module)
            step = module.Trainer.train_step
            held = HELD_STEP if os.environ.get("HOLD_RANK") in (None, os.environ.get("RANK")) else None

            def slow_step(self: Any) -> None:
                if not Path(os.environ.get("SLOW_UNTIL", "/never")).exists():
                    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
                while self.step == held and not Path(os.environ.get("HOLD_UNTIL", "/")).exists():
                    time.sleep(0.05)
                step(self)

            module.Trainer.train_step = slow_step

        spec.loader.exec_module = load_and_slow_down  # type: ignore[method-assign]
        return spec


def _device() -> str:
    """Of this process, as CUDA would give it."""
    place = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(place) if visible is None else visible.split(",")[place]


_broken = Path(os.environ.get("BROKEN_DEVICES", "/"))
if "LOCAL_RANK" in os.environ and _broken.is_file() and _device() in _broken.read_text().split():
    os.kill(os.getpid(), signal.SIGKILL)
if {"STEP_SECONDS", "HOLD_UNTIL"} & os.environ.keys():
    sys.meta_path.insert(0, _SlowSteps())
