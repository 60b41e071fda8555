"""The commands as a user gives them, each in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.running import environment, losses


def trireme(
    *arguments: str, code: int = 0, cwd: Path | None = None, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command on an input; it must end with `code`."""
    script = Path(sys.executable).with_name("trireme")
    done = subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        input=typed,
    )
    assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done


def refused(*arguments: str, cwd: Path | None = None) -> str:
    """Run a command that must be refused with one line; returns it."""
    done = trireme(*arguments, code=2, cwd=cwd)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_from_text_to_a_generating_model(corpus: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "runs" / "run"
    prepared = trireme(
        "prepare", "--source", str(corpus), "--out", str(data), "--vocab-size", "300", "--seq-len", "32"
    )
    assert "tokens/s" in prepared.stdout
    settings = [
        f"data.path={data}",
        f"run.dir={tmp_path / 'runs'}",
        "run.steps=4",
        "model.d_model=64",
        "model.num_layers=2",
        "data.global_batch_size=16",
        "parallel.dp_shard=2",
        "evaluation.every_steps=4",
    ]
    trained = trireme("train", "tiny", *settings)
    assert "step 4/4" in trained.stdout
    assert "Transformer(" in trained.stdout and "2 process(es), dp_shard 2" in trained.stdout
    for rank in range(2):
        assert "saved" in (run / "logs" / f"rank-{rank:05d}.log").read_text()
    assert "already" in trireme("train", "tiny", *settings).stdout
    trireme("train", "tiny", *settings, "run.steps=6", "schedule.total_steps=null")
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]

    assert "step 6  validation loss" in trireme("evaluate", str(run)).stdout
    greedy = ("generate", str(run), "--prompt", "The", "--temperature", "0", "--max-new-tokens", "8")
    text = trireme(*greedy).stdout
    assert text.startswith("The") and len(text) > 4
    assert trireme(*greedy).stdout == text
    answers = trireme(*greedy[:2], "--interactive", *greedy[4:], typed="The\nThe\n").stdout
    assert answers == text + text
    assert trireme("plot", str(run)).stdout.strip() == str(run / "curves.png")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    # a run folder alone is enough to generate from, wherever it is
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    shutil.rmtree(data)
    assert trireme("generate", str(moved), *greedy[2:]).stdout == text
    assert "trireme prepare" in refused("evaluate", str(moved))


@pytest.mark.slow
def test_same_run_under_the_users_launcher(tiny_config: str, tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}", "run.steps=3"]
    trireme("train", tiny_config, *settings, "run.name=ours", "parallel.dp_shard=2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "train", tiny_config, *settings, "run.name=theirs"]
    subprocess.run(command, check=True, capture_output=True, env=environment() | {"OMP_NUM_THREADS": "1"})
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=nowhere", "nowhere"),
        ("data.pth=x", "did you mean 'data.path'?"),
        ("model.vocab_size=7", "model.vocab_size=7 is smaller than the 300 tokens"),
        ("model.max_seq_len=16", "model.max_seq_len=16 is shorter than the sequences"),
        ("model.attention.kernel=flex", "kernel=flex can't train on a CPU"),
        ("data.global_batch_size=9", "data.global_batch_size"),
        ("parallel.dp_shard=3", "data.micro_batch_size x data-parallel ranks = 2 x 3 = 6"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    tiny_config: str, tmp_path: Path, override: str, message: str
) -> None:
    line = refused("train", tiny_config, f"run.dir={tmp_path / 'runs'}", override)
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    assert "is not a run's folder" in refused("generate", str(tmp_path))
    assert "has no metrics.jsonl" in refused("plot", str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
def test_unwritable_run_folder_is_refused(tiny_config: str, tmp_path: Path, ranks: int) -> None:
    """Before any process is started."""
    (tmp_path / "file").write_text("")
    settings = [f"run.dir={tmp_path / 'file'}", f"parallel.dp_shard={ranks}"]
    assert "can't be written: set run.dir" in refused("train", tiny_config, *settings)


@pytest.mark.slow
def test_save_that_fails_is_told_and_nothing_is_lost(tiny_config: str, tmp_path: Path) -> None:
    """A limit on the size of files, which no waiting mends, as it mends a full disk."""
    settings = [tiny_config, f"run.dir={tmp_path}", "checkpoint.every_steps=2", "run.steps=4"]
    trireme("train", *settings, "run.steps=2", "schedule.total_steps=4")
    small = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({2**16}, {2**16}))"
    code = f"{small}; from train.cli import main; main()"
    command = [sys.executable, "-c", code, "train", *settings, "schedule.total_steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert (
        line.startswith("error: ") and "step-00000004: not saved: OSError: [Errno 27] File too large" in line
    )
    assert "Traceback" not in done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    trireme("train", *settings, "schedule.total_steps=4")
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]


def test_shows_where_each_value_came_from() -> None:
    shown = trireme("config", "show", "demo", "optimizer.lr=1e-3").stdout
    lines = {line.split(":")[0]: line for line in shown.splitlines()}
    assert lines["optimizer.lr"].split("#") == [
        "optimizer.lr: 0.001" + lines["optimizer.lr"][len("optimizer.lr: 0.001") :].split("#")[0],
        " command line",
    ]
    assert "configs/presets/tiny.yaml:" in lines["model.d_model"]
    assert "configs/demo.yaml:" in lines["data.path"]
    assert lines["optimizer.beta1"].endswith("# default")


def test_lists_configurations() -> None:
    assert "configs/presets/medium.yaml" in trireme("config", "list").stdout
