"""The README's commands, run as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.train.running import environment, losses

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The command lines of all shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [
        shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()
    ]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {command[1] for command in commands() if command[0] == "make"}
    targets |= set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test", "test-quick", "bench-quick"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_a_run_of_your_own(tmp_path: Path) -> None:
    """Every command of the README in order, in a folder with texts; training is cut short."""
    (tmp_path / "my_texts").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("[a-h]*.py")):
        shutil.copyfile(path, tmp_path / "my_texts" / f"{path.stem}.txt")
    short = ["model.num_layers=1", "model.d_model=64", "data.global_batch_size=16"]
    bin_folder = Path(sys.executable).parent
    ran = 0
    for command in commands():
        if command[0] in {"make", "source"} or command[0] == "tensorboard":
            continue
        if "train" in command:
            command = [re.sub(r"run.steps=(\d+)00", r"run.steps=\1", part) for part in command] + short
        command[0] = str(bin_folder / command[0])
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == 13
    assert [step for step, _, _ in losses(tmp_path / "runs" / "mine")] == list(range(1, 7))
    assert (tmp_path / "runs" / "mine" / "curves.png").is_file()
    assert len(losses(tmp_path / "runs" / "three")) == 20
