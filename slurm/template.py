"""The job script: what Slurm shall give, what this job is, and what every job does (`job.sh`)."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.config import SlurmConfig
from slurm.errors import SlurmError

_BODY = Path(__file__).with_name("job.sh")


@dataclass(frozen=True)
class Job:
    """What a job runs. Paths are absolute."""

    name: str
    folders: Sequence[Path]
    """The run's folder; of an array, each run's."""
    working_folder: Path
    python: str
    config: str
    """The file that the run is trained from, in the run's folder."""
    train: Sequence[str]
    """Arguments of `python`, and of torchrun, that train as one rank; `config` is appended."""
    check: Sequence[str]
    """Arguments of `python` that check a node; `config`, `alone` or `together`, and a folder are appended. It writes
    `ok ...`, or what is wrong, into a file of the node's name in the folder."""
    grace_seconds: int
    """From the signal to the time limit."""
    array: bool = False
    """Several runs, or one that is numbered as they are."""

    @property
    def logs(self) -> Path:
        """Where Slurm writes; of an array below it are the numbers, links to the runs' own folders."""
        first = self.folders[0]
        return (first / self.config).parent / "logs" if self.array else first / "logs"


def render(job: Job, config: SlurmConfig) -> str:
    """The script. Every value is quoted, so that none of them is ever a command.

    Raises:
        SlurmError: a folder's name that Slurm can't take.
    """
    options = "".join(f"#SBATCH --{line}\n" for line in _options(job, config))
    modules = [f"module load {shlex.quote(module)}" for module in config.modules]
    prepare = "\n".join([*modules, *config.prologue, *_exports(config)])
    values = "\n".join(f"{name}={value}" for name, value in _values(job, config))
    return f"#!/bin/bash\n{options}\n{values}\n\n{prepare}\n\n{_BODY.read_text()}"


def _options(job: Job, config: SlurmConfig) -> Iterator[str]:
    """Options of sbatch, as a script's comments spell them."""
    if "\\" in str(job.logs):
        raise SlurmError(
            f"{job.folders[0]}: Slurm can't write a log below a folder with a backslash: rename it"
        )
    logs = str(job.logs).replace("%", "%%") + ("/%a" if job.array else "")
    tasks = 1 if config.launcher == "torchrun" else config.processes_per_node
    yield f"job-name={_quoted(job.name)}"
    yield f"nodes={config.nodes}"
    yield f"ntasks-per-node={tasks}"
    yield f"cpus-per-task={_cpus(config)}"
    given = {
        "gres": config.gres,
        "gpus-per-node": config.gpus_per_node if config.gres is None else None,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "exclude": config.exclude,
        "reservation": config.reservation,
        "dependency": config.dependency,
        "comment": config.comment,
    }
    yield from (f"{name}={_quoted(str(value))}" for name, value in given.items() if value is not None)
    yield f"signal=B:{config.signal}@{job.grace_seconds}"
    yield "requeue" if config.requeue else "no-requeue"
    yield "open-mode=append"
    yield f"chdir={_quoted(str(job.working_folder))}"
    yield f"output={_quoted(f'{logs}/slurm-%j.log')}"
    if job.array:
        yield f"array=0-{len(job.folders) - 1}" + (f"%{config.array_at_once}" if config.array_at_once else "")


def _values(job: Job, config: SlurmConfig) -> Iterator[tuple[str, str]]:
    """Variables that `job.sh` reads, with their values as shell."""
    yield "runs", _array(map(str, job.folders))
    yield "config", shlex.quote(job.config)
    yield "signal", config.signal
    yield "requeue", "yes" if config.requeue else "no"
    yield "restarts_without_progress", str(config.restarts_without_progress)
    yield "launcher", config.launcher
    yield "processes", str(config.processes_per_node)
    yield "max_restarts", str(config.max_restarts)
    yield "cpus", str(_cpus(config))
    yield "address", config.address
    yield "interface", shlex.quote(config.interface or "")
    yield "health", ("together" if config.health.collective else "alone") if config.health.enabled else "no"
    yield "health_seconds", str(config.health.timeout_seconds)
    yield "python", shlex.quote(config.python or job.python)
    yield "torchrun_options", _array(_torchrun_options(config))
    yield "train", _array(job.train)
    yield "check", _array(job.check)
    yield "srun_options", _array(_srun_options(job, config))
    yield "inside", _array(_apptainer(job, config))


def _cpus(config: SlurmConfig) -> int:
    """Of a task."""
    return config.cpus_per_process * (config.processes_per_node if config.launcher == "torchrun" else 1)


def _torchrun_options(config: SlurmConfig) -> Iterator[str]:
    yield f"--nproc-per-node={config.processes_per_node}"
    yield f"--max-restarts={config.max_restarts}"
    yield "--rdzv-backend=c10d"
    yield "--signals-to-handle=SIGQUIT"
    if config.bind_cpus and config.gpus_per_node is not None:
        yield "--numa-binding=node"


def _srun_options(job: Job, config: SlurmConfig) -> Iterator[str]:
    if config.bind_cpus and config.launcher == "srun":
        yield "--cpu-bind=cores"
    if config.container is not None and config.container_runtime == "pyxis":
        yield f"--container-image={config.container}"
        yield f"--container-mounts={','.join(_mounts(job, config))}"
        yield f"--container-workdir={job.working_folder}"


def _apptainer(job: Job, config: SlurmConfig) -> Iterator[str]:
    if config.container is not None and config.container_runtime == "apptainer":
        yield from ("apptainer", "exec", "--nv", f"--pwd={job.working_folder}")
        yield from (f"--bind={mount}" for mount in _mounts(job, config))
        yield config.container


def _mounts(job: Job, config: SlurmConfig) -> list[str]:
    own = (
        f"{path}:{path}"
        for path in (job.working_folder, *dict.fromkeys(folder.parent for folder in job.folders))
    )
    return [*own, *(mount if ":" in mount else f"{mount}:{mount}" for mount in config.container_mounts)]


def _exports(config: SlurmConfig) -> Iterator[str]:
    given = {
        "OMP_NUM_THREADS": str(config.cpus_per_process),
        "PYTHONUNBUFFERED": "1",
        # torchrun tells workers to end only if another failed, and then there is nothing to wait for
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        # a store for each start: agents count restarts apart, and a shared one has the addresses of the dead
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if config.interface is not None:
        given |= {"NCCL_SOCKET_IFNAME": config.interface, "GLOO_SOCKET_IFNAME": config.interface}
    for name, value in (given | config.environment).items():
        yield f"export {name}={shlex.quote(value)}"


def _array(words: Iterable[str]) -> str:
    return f"({' '.join(shlex.quote(word) for word in words)})"


def _quoted(value: str) -> str:
    """As Slurm reads a value in a script's comments: a backslash takes the next character as it is."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
