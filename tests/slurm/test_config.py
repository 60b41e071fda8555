"""The `slurm` section, and what is refused before a job is submitted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from slurm.config import SlurmConfig
from tests.slurm.cluster import missing_programs
from tests.train.running import environment
from train.config_file import CONFIGS, load_config


def trireme(*arguments: str, cwd: Path, code: int = 0) -> str:
    """What the command prints: all of it, or where it fails its one line of error."""
    command = [sys.executable, "-c", "from train.cli import main; main()", *arguments]
    nowhere = {"PATH": str(Path(sys.executable).parent)}  # no cluster is asked
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | nowhere, cwd=cwd)
    assert done.returncode == code, done.stderr
    if not code:
        return done.stdout
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("time", ["90", "90:30", "24:00:00", "2-12", "2-12:30", "2-12:30:15", 90])
def test_slurms_times_are_times(time: object) -> None:
    assert SlurmConfig.model_validate({"time": time}).time == str(time)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"time": "1h"}, "slurm.time='1h' is none of Slurm's times"),
        ({"time": "24:00:99"}, "none of Slurm's times"),
        ({"memory": "64 gigabytes"}, "write 64G"),
        ({"partition": "a\n#SBATCH --wrap=x"}, "not a line of text"),
        ({"comment": ""}, "not a line of text"),
        ({"environment": {"A-B": "1"}}, "'A-B' is not a variable's name"),
        ({"gpus_per_node": 8, "procs_per_node": 4}, "give one of the two"),
        ({"gres": "gpu:h100:8"}, "say with slurm.gpus_per_node how many"),
    ],
)
def test_wrong_values_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SlurmConfig.model_validate(settings)


def test_a_time_in_a_file_needs_no_quotes(tiny_config: str, tmp_path: Path) -> None:
    """YAML 1.1 would read 24:00:00 as a number of seconds."""
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: {tiny_config}\nslurm: {{time: 24:00:00, nodes: 2}}\n")
    assert load_config(str(file)).config.slurm.time == "24:00:00"
    assert load_config(str(file), ["slurm.time=1:30:00"]).config.slurm.time == "1:30:00"


def test_a_profile_comes_between_the_configuration_and_the_command_line(tiny_config: str) -> None:
    loaded = load_config(tiny_config, ["slurm.cpus_per_process=4"], ["gpu8"])
    slurm = loaded.config.slurm
    assert (slurm.gpus_per_node, slurm.time, slurm.cpus_per_process) == (8, "24:00:00", 4)
    assert loaded.sources["slurm.time"].startswith("configs/clusters/gpu8.yaml:")


def test_dry_run_prints_the_script_and_leaves_nothing(tiny_config: str, tmp_path: Path) -> None:
    options = ["--nodes", "2", "--procs-per-node", "2", "--time", "1-00:00:00", "--dry-run"]
    script = trireme("submit", tiny_config, "run.name=$(x) 'y", *options, cwd=tmp_path)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        'job-name="$(x) \'y"',
        "nodes=2",
        "ntasks-per-node=1",
        'time="1-00:00:00"',
        "signal=B:USR2@120",
    ):
        assert f"#SBATCH --{line}" in lines
    assert f"runs=('{tmp_path}/runs/$(x) '\"'\"'y')" in lines
    assert not list(tmp_path.iterdir())
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_what_would_not_fit_is_refused_before_it_is_submitted(tiny_config: str, tmp_path: Path) -> None:
    submit = ["submit", tiny_config, "slurm.gpus_per_node=2", "--dry-run"]
    assert "#SBATCH" in trireme(*submit, "slurm.gpu=h100-80gb", cwd=tmp_path)
    small = tmp_path / "small.yaml"
    facts = (CONFIGS / "hardware" / "h100-80gb.yaml").read_text()
    small.write_text(re.sub("memory_gib: [0-9.]+", "memory_gib: 2.0005", facts))
    said = trireme(*submit, f"slurm.gpu={small}", cwd=tmp_path, code=2)
    assert "run would need 2.1" in said and "reserve 2.1" in said and "trireme plan CONFIG --gpus 2" in said
    assert "there is no device 'h1000'" in trireme(*submit, "slurm.gpu=h1000", cwd=tmp_path, code=2)


def test_every_feature_finds_its_place(tiny_config: str, tmp_path: Path) -> None:
    given = {
        "gpus_per_node": "2",
        "gres": "gpu:h100:2",
        "partition": "p",
        "account": "a",
        "qos": "q",
        "constraint": "c&d",
        "exclude": "n[1-2]",
        "reservation": "r",
        "memory": "64G",
        "dependency": "afterok:1",
        "comment": "hello world",
        "container": "image.sqsh",
        "container_mounts": "[/data]",
        "modules": "[cuda/12.4]",
        "environment.NCCL_DEBUG": "INFO",
        "prologue": "['ulimit -l unlimited']",
        "interface": "ib0",
        "python": "/opt/python",
        "requeue": "false",
    }
    settings = [f"slurm.{key}={value}" for key, value in given.items()]
    script = trireme("submit", tiny_config, *settings, "--dry-run", cwd=tmp_path)
    for line in (
        'gres="gpu:h100:2"',
        'partition="p"',
        'account="a"',
        'qos="q"',
        'constraint="c&d"',
        "no-requeue",
    ):
        assert f"#SBATCH --{line}\n" in script
    for line in (
        'exclude="n[1-2]"',
        'reservation="r"',
        'mem="64G"',
        'dependency="afterok:1"',
        'comment="hello world"',
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "module load cuda/12.4\nulimit -l unlimited\n" in script
    assert "export NCCL_SOCKET_IFNAME=ib0" in script and "export NCCL_DEBUG=INFO" in script
    assert f"--container-image=image.sqsh --container-mounts={tmp_path}:{tmp_path}," in script
    assert (
        "--nproc-per-node=2" in script and "--numa-binding=node" in script and "python=/opt/python" in script
    )
    runtime = "slurm.container_runtime=apptainer"
    script = trireme("submit", tiny_config, *settings, runtime, "--dry-run", cwd=tmp_path)
    assert "inside=(apptainer exec --nv" in script and "--bind=/data:/data image.sqsh)" in script


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nodes", "3"], "data.global_batch_size=8 is not a multiple"),
        (["--nodes", "2", "parallel.tp=3"], "parallel.tp=3"),
        (["--time", "soon"], "slurm.time='soon' is none of Slurm's times"),
        (["slurm.partitoin=x"], "did you mean 'slurm.partition'?"),
        (["--array", "optimizer.lr"], "--array optimizer.lr is not of the form"),
        (["--array", "slurm.nodes=1,2"], "have one `slurm` section"),
        (["--cluster", "gpu9"], "did you mean 'gpu8'?"),
    ],
)
def test_what_can_not_work_is_refused_before_it_is_submitted(
    tiny_config: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    assert says in trireme("submit", tiny_config, *arguments, "--dry-run", cwd=tmp_path, code=2)


def test_without_slurm_it_says_where_to_go(tiny_config: str, tmp_path: Path) -> None:
    assert "give the command on a login node" in trireme("submit", tiny_config, cwd=tmp_path, code=2)
    assert "give the command on a login node" in trireme("jobs", cwd=tmp_path, code=2)


def test_the_cluster_of_the_tests_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.cluster._SEARCHED", "/nowhere")
    assert "slurmctld" in missing_programs()
