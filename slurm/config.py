"""The `slurm` section of a run's configuration: what a job asks the cluster for, and how it runs there."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_TIME = re.compile(r"\d+(:[0-5]?\d(:[0-5]?\d)?)?|\d+-\d{1,2}(:[0-5]?\d(:[0-5]?\d)?)?")
_BYTES = re.compile(r"\d+[KMGT]?")
_NAME = re.compile(r"[A-Za-z_]\w*")


def _one_line(value: str) -> str:
    if not value.strip() or any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ValueError(f"{value!r} is not a line of text: leave out control characters, or the whole key")
    return value


def _time(value: str) -> str:
    if not _TIME.fullmatch(value):
        raise ValueError(
            f"slurm.time={value!r} is none of Slurm's times: write 90 (minutes), 24:00:00, or 2-12:00:00 (days)"
        )
    return value


def _bytes(value: str) -> str:
    if not _BYTES.fullmatch(value):
        raise ValueError(
            f"slurm.memory={value!r} is not an amount of memory: write 64G for example, or 0 for all"
        )
    return value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"slurm.environment: {name!r} is not a variable's name: use letters, digits and '_'"
            )
    return values


def _as_text(value: object) -> object:
    """YAML reads `90` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Line = Annotated[str, BeforeValidator(_as_text), AfterValidator(_one_line)]


class Section(BaseModel):
    """A section: unknown keys are refused, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class HealthConfig(Section):
    """What every node must show, in seconds, before a job's processes start on it."""

    enabled: bool = True
    """Check the nodes; a bad one is named, and left out when the job starts again."""
    free_disk_gb: float = Field(1.0, ge=0)
    """Free space for the run's folder and for temporary files, in GB."""
    free_shared_memory_gb: float = Field(0.5, ge=0)
    """Free space in /dev/shm, in GB."""
    used_gpu_memory_gb: float = Field(1.0, ge=0)
    """A GPU of which more than this is in use, in GB, is not empty."""
    command: Line | None = None
    """A shell command of your own: a node where it fails is bad."""
    collective: bool = True
    """Join all nodes in a group, exchange data, and show the bandwidth."""
    bandwidth_gb: float = Field(0.0, ge=0)
    """With `collective`: a node that exchanges less than this with both neighbours, in GB/s each way, is bad."""
    clock_skew_seconds: float = Field(2.0, gt=0)
    """With `collective`: a clock that is further off the nodes' median is bad."""
    timeout_seconds: int = Field(120, ge=1)
    """A node that has not answered by then is bad."""


class SlurmConfig(Section):
    """A job of `nodes` times `gpus_per_node` (or `procs_per_node`) processes. What is unset, the cluster decides."""

    nodes: int = Field(1, ge=1)
    """Nodes of the job."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of each node, and as many processes."""
    procs_per_node: int | None = Field(None, ge=1)
    """Without GPUs: processes on each node."""
    gpu: Line | None = None
    """Which GPUs these are, by a name in configs/hardware/ or a file: whether a run fits their memory is then predicted
    before it is submitted."""
    gres: Line | None = None
    """Generic resources instead of plain GPUs, such as `gpu:h100:8`; gpus_per_node still says how many processes."""
    cpus_per_process: int = Field(1, ge=1)
    """CPU cores of each process, which are also its threads."""
    memory: Annotated[str, BeforeValidator(_as_text), AfterValidator(_bytes)] | None = None
    """Of each node, such as `64G`; 0 for all of it."""
    time: Annotated[str, BeforeValidator(_as_text), AfterValidator(_time)] | None = None
    """The time limit, as Slurm writes it: minutes, 24:00:00 or 2-12:00:00."""
    partition: Line | None = None
    """Where to run."""
    account: Line | None = None
    """Who pays."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    exclude: Line | None = None
    """Nodes to stay away from, such as `n[3-5],n9`."""
    reservation: Line | None = None
    """Run within this reservation."""
    dependency: Line | None = None
    """Start only after other jobs, such as `afterok:123`."""
    comment: Line | None = None
    """Kept with the job."""
    array_at_once: int | None = Field(None, ge=1)
    """With `trireme submit --array`: how many of the runs may run at a time."""
    signal: Literal["USR2", "USR1", "TERM"] = "USR2"
    """What asks the processes to save and stop, run.grace_time ahead of the time limit. NCCL has been seen to use
    USR1."""
    requeue: bool = True
    """Put the job back into the queue when it was stopped before its end, or failed, or lost a node."""
    restarts_without_progress: int = Field(3, ge=1)
    """After so many restarts in a row from the same checkpoint the job gives up, with a report."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """`torchrun`: an agent on each node starts the processes; `srun`: each process is a task of Slurm's."""
    max_restarts: int = Field(3, ge=0)
    """How often processes that failed are started again within the job, before it is requeued."""
    address: Literal["node_addr", "hostname"] = "node_addr"
    """How the first node is reached: by the address that Slurm itself uses, or by its name."""
    interface: Line | None = None
    """The network interface that nodes talk over, such as `ib0`; it replaces `address`."""
    bind_cpus: bool = True
    """Bind each process to cores of its own: those near its GPU under torchrun, Slurm's choice under srun."""
    container: Line | None = None
    """An image in which the processes run."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs it: pyxis (enroot), by options of srun, or apptainer."""
    container_mounts: tuple[Line, ...] = ()
    """Folders seen from within, `path` or `path:path within`. The working folder and the run's are always there."""
    modules: tuple[Line, ...] = ()
    """Loaded with `module load` before anything else."""
    environment: Annotated[dict[str, Line], AfterValidator(_variables)] = {}
    """Variables of the processes' environment."""
    prologue: tuple[Line, ...] = ()
    """Lines of shell that run on the first node before all else, as they are."""
    python: Line | None = None
    """The interpreter on the nodes; unset: the one that submits."""
    health: HealthConfig = HealthConfig()
    """Node health."""

    @model_validator(mode="after")
    def _check(self) -> "SlurmConfig":
        gpus, processes = self.gpus_per_node, self.procs_per_node
        if gpus is not None and processes is not None and gpus != processes:
            raise ValueError(
                f"slurm.gpus_per_node={gpus} and slurm.procs_per_node={processes}: each process has one GPU, so give "
                f"one of the two"
            )
        if self.gres is not None and gpus is None and "gpu" in self.gres:
            raise ValueError(
                f"slurm.gres={self.gres}: say with slurm.gpus_per_node how many processes a node has, one per GPU"
            )
        return self

    @property
    def processes_per_node(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node or self.procs_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.processes_per_node
