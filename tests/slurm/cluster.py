"""A real Slurm cluster of pretend nodes on this machine: its own munge, controller and daemons, for any user.

`python -m tests.slurm.cluster` starts one and a shell in which Slurm's commands speak to it.
"""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from train.stop import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
HOW_TO_GET_THEM = "Debian, Ubuntu: apt-get install slurmctld slurmd slurm-client munge"
_SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_CPUS, _MEGABYTES = 16, 8000  # that each node claims to have: they only count


def missing_programs() -> list[str]:
    """What a cluster needs and this machine has not."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCHED) is None]


class Cluster:
    """Nodes n1, n2, ... with the partitions `main` and, which `high` preempts, `low`. Use as a context manager."""

    def __init__(self, nodes: int = 4, first_job: int = 1) -> None:
        """first_job: a number that keeps the jobs' ports, which derive from theirs, apart from another cluster's."""
        self.first_job = first_job
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        # sockets' names are short: not below a test's own folder
        self.folder = Path(tempfile.mkdtemp(prefix="trireme-slurm-", dir="/tmp"))
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf), "PATH": _SEARCHED}
        """What Slurm's commands need in order to speak to this cluster."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        with ExitStack() as on_failure:
            on_failure.callback(self._stop)
            for name in ("controller", "log", "munge", "run", *(f"spool/{name}" for name in self.names)):
                (self.folder / name).mkdir(parents=True)
            (self.folder / "controller").chmod(0o700)
            self._start_munge()
            self._write_conf()
            self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
            for name in self.names:
                self.start_node(name)
            self.wait_until_idle()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def command(self, *arguments: str) -> str:
        """Output of one of Slurm's commands."""
        environment = os.environ | self.environment
        return subprocess.run(
            arguments, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def start_node(self, name: str) -> None:
        """Bring a node's daemon up (again)."""
        self._start(name, ["slurmd", "-D", "-f", str(self.conf), "-N", name])

    def kill_node(self, name: str) -> None:
        """As if the power went: the daemon and every process on the node, at once."""
        _kill([self._daemons[name].pid, *self._step_managers(name), *self.processes(name)])
        self._daemons.pop(name).wait()

    def processes(self, node: str = "") -> list[int]:
        """Processes of jobs on a node, or on any."""
        return [
            process
            for process, environment in _environments()
            if environment.get("SLURM_CONF") == str(self.conf)
            and environment.get("SLURMD_NODENAME", "-") in ([node] if node else self.names)
        ]

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until no node has a job on it.

        Raises:
            RuntimeError: a daemon has ended, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended:
                break
            shown = subprocess.run(  # fails until there is a controller
                ["sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"],
                env=os.environ | self.environment,
                capture_output=True,
                text=True,
            )
            if shown.stdout.strip() == str(len(self.names)):
                return
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-2000:] for path in sorted((self.folder / "log").iterdir()))
        raise RuntimeError(f"the cluster's nodes are not idle: {logs}")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
        files |= {"seed-file": folder / "seed", "log-file": folder / "log"}
        options = [f"--{name}={path}" for name, path in files.items()]
        # force: a world-writable /tmp above it is no reason to refuse
        self._start("munged", ["munged", "--foreground", "--force", *options])

    def _write_conf(self) -> None:
        controller, *nodes = _free_ports(1 + len(self.names))
        host, user, folder = socket.gethostname().partition(".")[0], getpass.getuser(), self.folder
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # a job that is requeued waits as long as its credential lives; two minutes unless 5 s or more are given
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
            "StateSaveLocation": folder / "controller",
            "SlurmdSpoolDir": folder / "spool" / "%n",
            "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
            "SlurmdPidFile": folder / "run" / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log" / "slurmctld.log",
            "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            # where nodes share two cores they answer late; what isn't answered in time is sent again, and the end of a
            # job that was requeued would meet its next start
            "MessageTimeout": 60,
            "TCPTimeout": 20,
            "SlurmdTimeout": 20,
            "KillWait": 20,
            "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=100000",
            "JobRequeue": 1,
            "FirstJobId": self.first_job,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        ports = ",".join(map(str, nodes))
        self.conf.write_text(
            "".join(f"{key}={value}\n" for key, value in lines.items())
            + f"NodeName=n[1-{len(nodes)}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] "
            f"CPUs={_CPUS} RealMemory={_MEGABYTES}\n"
            "PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF\n"
            "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60\n"
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF\n"
        )

    def _stop(self) -> None:
        """End the daemons and all that jobs left, by their process ids, and remove the folder."""
        kept = [*self.processes(), *(p for name in self.names for p in self._step_managers(name))]
        _kill([daemon.pid for daemon in self._daemons.values()])
        for daemon in self._daemons.values():
            daemon.wait()
        _kill(kept)
        shutil.rmtree(self.folder, ignore_errors=True)  # a process may write its last

    def _step_managers(self, node: str) -> Iterator[int]:
        """slurmstepd of a node's jobs, by the log that they hold open."""
        log = str(self.folder / "log" / f"slurmd-{node}.log")
        for folder in Path("/proc").glob("[0-9]*/fd"):
            try:
                if (folder.parent / "comm").read_text().strip() == "slurmstepd" and log in map(
                    os.readlink, folder.iterdir()
                ):
                    yield int(folder.parent.name)
            except OSError:  # it has ended
                continue


def _environments() -> Iterator[tuple[int, Mapping[str, str]]]:
    """Every process that we may look into, and its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        yield int(path.parent.name), dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _kill(processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def wait_at_most(seconds: float) -> Iterator[Iterator[None]]:
    """`for _ in times:` goes on until it breaks; AssertionError when the time is over."""
    deadline = time.monotonic() + seconds

    def times() -> Iterator[None]:
        while time.monotonic() < deadline:
            yield
            time.sleep(0.2)
        raise AssertionError(f"it did not happen within {seconds} s")

    yield times()


def job_id(output: str) -> int:
    """The number in what a submission prints."""
    found = re.search(r"job (\d+)", output)
    assert found, output
    return int(found[1])


if __name__ == "__main__":
    with Cluster() as started:
        subprocess.run([os.environ.get("SHELL", "bash")], env=os.environ | started.environment, check=False)
