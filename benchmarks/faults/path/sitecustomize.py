"""On the path of a run that is disturbed: plants the faults of the plan `TRIREME_CHAOS` in its ranks."""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class _Planting(importlib.abc.MetaPathFinder):
    """Finds train.run, which ranks alone load, and plants once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only of that module."""
        if fullname != "train.run":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_plant(module: ModuleType) -> None:
            load(module)
            from benchmarks.faults.planted import plant

            plant(module, Path(os.environ["TRIREME_CHAOS"]), int(os.environ["RANK"]))

        spec.loader.exec_module = load_and_plant  # type: ignore[method-assign]
        return spec


if {"TRIREME_CHAOS", "RANK"} <= os.environ.keys():
    sys.meta_path.insert(0, _Planting())
