"""docs/adding_a_model.md, done as it stands there, in a copy of the project."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.running import environment, losses

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "adding_a_model.md").read_text()


def block(language: str, after: str = "") -> str:
    """The first block of a language after a piece of the page."""
    rest = PAGE[PAGE.index(after) :]
    found = re.search(rf"```{language}\n(.*?)```", rest, flags=re.DOTALL)
    assert found, (language, after)
    return found[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The project's packages with what the page adds, and a folder of texts."""
    root = tmp_path_factory.mktemp("project")
    for room in ("model", "data", "parallel", "train", "configs"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"^`([\w/.]+)`\n\n```(\w+)\n", PAGE, flags=re.MULTILINE)
    assert len(files) == 4
    for name, language in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(block(language, after=f"\n`{name}`\n"))
    table = root / "model" / "models.py"
    table.write_text(
        table.read_text().replace("MODELS = {\n", "MODELS = {\n" + block("python", after="## 3."))
    )
    shutil.copytree(corpus, root / "my_texts")
    return root


def run(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`trireme ...` of the copy, in it."""
    code = "import sys; from train.cli import main; sys.argv[0] = 'trireme'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=project,
        env=environment() | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_page_trains(project: Path) -> None:
    for line in block("sh").splitlines():
        done = run(project, *shlex.split(line)[1:])
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "step 60  validation loss" in done.stdout
    rows = [loss for _, loss, _ in losses(project / "runs" / "mingru")]
    assert len(rows) == 60 and sum(rows[-5:]) < 0.6 * sum(rows[:5])
    done = run(project, "generate", "runs/mingru")
    assert (done.returncode, done.stderr) == (2, block("text"))
    done = run(project, "train", "mingru.yaml", "evaluation.sample_every_steps=5", "run.name=other")
    assert done.returncode == 2 and "a model of type mingru generates nothing: leave it out" in done.stderr


def test_the_page_fits_the_projects_own_test(project: Path) -> None:
    """The test of all models, pointed at the copy."""
    shutil.copytree(
        ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "mingru", "tests/model/test_models.py"],
        cwd=project,
        env=environment() | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
