"""docs/models.md: every key is one of the configuration, with a value that it can have, and every test exists."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from model.aliases import CHOICES, NAMES, TYPES
from model.models import MODELS, config_class
from train.config import Config
from train.config_file import ALIASES, all_keys

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text()
ROWS = re.findall(r"^\| (.*?) \| (`.*?`)? ?\| `(tests/\S+?)` \|$", PAGE, flags=re.MULTILINE)
KEYS = sorted({key.strip("`") for _, key, _ in ROWS if key})


@cache
def defined_in(path: str) -> set[str]:
    """The names of the test functions of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def annotations(key: str) -> list[Any]:
    """Of a dotted key, in every type of model that has it."""
    found = []
    for model_type in MODELS:
        section: Any = Config
        for part in key.split("."):
            if section is Config and part == "model":
                section = config_class(model_type)
                continue
            fields = getattr(section, "model_fields", {})
            section = fields[part].annotation if part in fields else None
            inner = [
                kind for kind in get_args(section) if isinstance(kind, type) and issubclass(kind, BaseModel)
            ]
            section = inner[0] if inner else section
        found.append(section)
    return [annotation for annotation in found if annotation is not None]


def test_the_page_is_read_whole() -> None:
    lines = [line for line in PAGE.splitlines() if "tests/" in line and line.startswith("|")]
    assert len(ROWS) == len(lines) > 80
    documents = re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    assert len(documents) == 6, "five documents and the spellings"


@pytest.mark.parametrize("test", sorted({test for _, _, test in ROWS}))
def test_every_test_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert name.startswith("test_") and name in defined_in(path)


@pytest.mark.parametrize("entry", KEYS)
def test_every_key_is_one_of_the_configuration(entry: str) -> None:
    key, _, value = entry.partition("=")
    known = {known for model_type in MODELS for known in all_keys(Config, model_type)}
    assert key in ALIASES or key in known or any(other.startswith(f"{key}.") for other in known)
    if key == "model.type":
        assert value in {*MODELS, *TYPES}
    elif value:
        allowed = {
            choice for kind in annotations(key) if get_origin(kind) is Literal for choice in get_args(kind)
        }
        assert value in allowed


def test_every_spelling_is_on_the_page() -> None:
    spellings = PAGE.partition("## Spellings")[2]
    for name in (*NAMES, *CHOICES, *TYPES):
        assert f"`{name}`" in spellings, name
