"""What the ranks of a disturbed run and the one who disturbs it tell each other, in files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.faults.schedule import Fault


@dataclass(frozen=True)
class Reached:
    """A rank is where its fault strikes, and waits for it, or brings it about."""

    pid: int
    agent: int
    """The torchrun that started it."""
    step: int
    """The step under way, or done last; 0 when starting."""


class Plan:
    """A folder with the faults of a run; what is in it survives the run's processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "plan.json"

    def write(self, faults: list[Fault], nan_every: int) -> None:
        """Write down what is to happen. nan_every: of so many steps, one has no finite gradient."""
        self.folder.mkdir(parents=True)
        plan = {"faults": [asdict(fault) for fault in faults], "nan_every": nan_every}
        self._file.write_text(json.dumps(plan))

    def read(self) -> tuple[list[Fault], int]:
        """What `write` wrote."""
        plan = json.loads(self._file.read_text())
        return [Fault(**fault) for fault in plan["faults"]], plan["nan_every"]

    def reach(self, index: int, reached: Reached) -> None:
        """The rank is there."""
        aside = self.folder / f"reached-{index}.tmp"
        aside.write_text(json.dumps(asdict(reached)))
        aside.rename(self._reached(index))

    def reached(self, index: int) -> Reached | None:
        """Whether the fault has struck, and where."""
        file = self._reached(index)
        return Reached(**json.loads(file.read_text())) if file.exists() else None

    def release(self, index: int) -> None:
        """The rank may go on, if it is still alive."""
        (self.folder / f"released-{index}").touch()

    def released(self, index: int) -> bool:
        """Whether it may."""
        return (self.folder / f"released-{index}").exists()

    def end(self, index: int) -> None:
        """The fault is over: the next one may strike."""
        (self.folder / f"over-{index}").touch()

    def over(self, index: int) -> bool:
        """Whether it is."""
        return (self.folder / f"over-{index}").exists()

    def _reached(self, index: int) -> Path:
        return self.folder / f"reached-{index}"
