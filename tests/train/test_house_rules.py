"""Rules of the house that a reader relies on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "slurm": {"slurm"},
    "parallel": {"parallel", "model"},
    "train": {"train", "parallel", "model", "data", "slurm"},
}


def imports_of(source: str) -> set[str]:
    """The top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / room).rglob("*.py")
        for name in imports_of(path.read_text()) & (MAY_IMPORT.keys() - MAY_IMPORT[room])
    }
    assert not wrong


def test_the_import_check_sees_a_wrong_import() -> None:
    assert "train" in imports_of("def f():\n    from train.config import Config\n")


def test_the_model_knows_no_ranks() -> None:
    for path in (ROOT / "model").rglob("*.py"):
        assert "torch.distributed" not in path.read_text(), path


UNSAFE = re.compile(
    r"\bpickle\b(?! import UnpicklingError$)|torch\.load\((?!.*weights_only=True\)$)|\beval\(\s*['\"f]|shell=True"
    r"|os\.system",
    flags=re.MULTILINE,
)


def test_nothing_is_unpickled() -> None:
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            assert not UNSAFE.search(path.read_text()), path


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("state = torch.load(path)", True),
        ("state = torch.load(path, weights_only=False)", True),
        ("from pickle import UnpicklingError", False),
        ("return torch.load(path, weights_only=True)", False),
    ],
)
def test_the_check_of_unpickling_sees_what_is_unsafe(line: str, unsafe: bool) -> None:
    assert bool(UNSAFE.search(f"{line}\n")) == unsafe


def changed_in_place(source: str) -> list[str]:
    """What the forwards of a file's autograd functions call that ends with an underscore, as `mul_` does."""
    return [
        call.func.attr
        for cls in ast.walk(ast.parse(source))
        if isinstance(cls, ast.ClassDef)
        and any("autograd.Function" in ast.unparse(base) for base in cls.bases)
        for function in cls.body
        if isinstance(function, ast.FunctionDef) and function.name == "forward"
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr.endswith("_")
    ]


def test_no_autograd_function_changes_its_result_in_place() -> None:
    """Compiled by torch before 2.13, it would have no gradient (pytorch/pytorch#180642). The loss is never compiled."""
    for room in ("model", "parallel"):
        for path in {*(ROOT / room).rglob("*.py")} - {ROOT / "model" / "loss.py"}:
            assert not changed_in_place(path.read_text()), path


def test_the_check_of_forwards_sees_a_change_in_place() -> None:
    function = "class F(torch.autograd.Function):\n    def forward(ctx, x, y):\n        return x.exp(){}\n"
    assert changed_in_place(function.format(".mul_(y)")) == ["mul_"]
    assert changed_in_place(function.format(".mul(y)")) == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from train.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'streaming', 'pydantic', 'numpy', 'scipy', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "prepare",
        "train",
        "submit",
        "jobs",
        "logs",
        "cancel",
        "tensorboard",
        "verify",
        "generate",
        "evaluate",
        "plot",
        "ladder",
        "export",
        "import",
        "checkpoint list",
        "checkpoint verify",
        "checkpoint prune",
        "checkpoint diff",
        "config show",
        "config list",
        "scaling fit",
        "scaling predict",
    ],
)
def test_every_command_shows_an_example(command: str) -> None:
    code = "import sys; from train.cli import app; app(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert f"trireme {command}" in done.stdout.partition("Example:")[2]
