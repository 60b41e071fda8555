"""Reading a configuration: YAML with `extends`, dotted overrides, and where each value came from."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from model.aliases import CHOICES, NAMES
from model.dotted import Values, nest, put
from model.models import MODELS, config_class
from model.spellings import Settings
from train.config import Config
from train.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
REPLACED_TOGETHER = ({"run.steps", "run.tokens"}, {"dial.params", "dial.depth", "dial.flops"})
ALIASES = [f"model.{name}" for name in (*NAMES, *CHOICES)]


@dataclass(frozen=True)
class Loaded:
    """A validated configuration, and the source of every value that is not a default, by dotted key."""

    config: Config
    sources: dict[str, str]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number and 24:00:00 is none (YAML 1.2)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != "tag:yaml.org,2002:int"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|\d[\d_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def load_config(path_or_name: str, overrides: Iterable[str] = (), profiles: Iterable[str] = ()) -> Loaded:
    """Read a configuration file, or one below configs/ by its name, and apply `key.path=value` overrides.

    profiles: further files, of which the later wins, such as a cluster's.

    Raises:
        ConfigError: anything wrong with the file, a key or a value, in one line.
    """
    settings = _Layers()
    for each in (path_or_name, *profiles):
        _read_file(find_config(each), settings, seen=())
    given: Values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"{override!r} is not of the form key.path=value, such as optimizer.lr=3e-4")
        put(given, key, _parse_override(key, text), "command line")
    settings.add(given)
    values = settings.all.settled()
    config = _validate(values)
    if config.dial is not None:
        from train.dial import turned  # only here: counting a model's parameters imports torch

        values = turned(values, config, config.dial, settings.since_dial.values)
        config = _validate(values)
    return Loaded(config, {key: source for key, (_, source) in values.items()})


class _Layers:
    """What is said by files and the command line, later ones last; apart, what is said since the dial was turned."""

    def __init__(self) -> None:
        self.all, self.since_dial = Settings(prefix="model."), Settings(prefix="model.")

    def add(self, layer: Values) -> None:
        """Say more. A layer that says one of run.steps and run.tokens, or turns the dial, replaces what was said of it.

        Raises:
            ConfigError: two spellings contradict each other, or a value is unknown.
        """
        if any(key.partition(".")[0] == "dial" for key in layer):
            self.since_dial = Settings(prefix="model.")
        said = {key for key, (value, _) in layer.items() if value is not None}
        for settings in (self.all, self.since_dial):
            for group in REPLACED_TOGETHER:
                for key in group if said & group else ():
                    settings.values.pop(key, None)
            try:
                settings.add(layer)
            except ValueError as error:
                raise ConfigError(str(error)) from None


def find_config(path_or_name: str) -> Path:
    """The file at a path, or `NAME.yaml` anywhere below configs/."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    named = {file.stem: file for file in all_configs()}
    if path_or_name in named:
        return named[path_or_name]
    close = _suggest(path_or_name, named)
    raise ConfigError(
        f"there is no configuration {path_or_name!r}{close}: give a file, or one of {', '.join(named)}"
    )


def all_configs() -> list[Path]:
    """Every configuration of a run that comes with the project."""
    return sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "hardware")


def _read_file(path: Path, settings: _Layers, seen: tuple[Path, ...]) -> None:
    """Add what a file says to the settings, after what it extends."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join(p.name for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:` at the top level")
    parents = tree.pop("extends", [])
    for parent in [parents] if isinstance(parents, str) else parents:
        beside = path.parent / str(parent)
        _read_file(beside if beside.is_file() else find_config(str(parent)), settings, (*seen, path))
    values: Values = {}
    for key, value, line in _leaves(root, tree, prefix=""):
        put(values, key, value, f"{_display(path)}:{line}")
    settings.add(values)


def _leaves(node: yaml.MappingNode, tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any, int]]:
    """Each dotted key below a mapping, with its value and line. An empty mapping is a leaf."""
    for key_node, value_node in node.value:
        if key_node.value not in tree:
            continue
        key, value = f"{prefix}{key_node.value}", tree[key_node.value]
        if isinstance(value_node, yaml.MappingNode) and isinstance(value, dict) and value:
            yield from _leaves(value_node, value, f"{key}.")
        else:
            yield key, value, key_node.start_mark.line + 1


def _parse_override(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text}: the value is not valid YAML: quote it") from None


def _validate(values: Values) -> Config:
    try:
        return Config.model_validate(nest(values))
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], values)) from None


def _explain(error: Any, values: Values) -> str:
    """One line for the first thing that pydantic found: where it stands, what is wrong, what would do."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    source = next((s for k, (_, s) in values.items() if k == key or k.startswith(f"{key}.")), None)
    where = f"{source}: " if source and source != "command line" else ""
    match error["type"]:
        case "extra_forbidden":
            model_type, _ = values.get("model.type", ("transformer", ""))
            return f"{where}unknown key {key!r}{_suggest_key(location, model_type)}"
        case "missing":
            in_list = any(part.isdigit() for part in location)
            return (
                f"{key!r} is missing: set it in the configuration{'' if in_list else f' or as {key}=VALUE'}"
            )
        case "value_error":
            return f"{where}{error['ctx']['error']}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}{key}={error['input']!r}: {message}"


def _suggest_key(location: list[str], model_type: str) -> str:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        inner = _section(section, part, model_type)
        if inner is None:
            return ""
        section = inner
    prefix = "".join(f"{part}." for part in location[:-1])
    close = _suggest(location[-1], section.model_fields, prefix)
    if close:
        return close
    elsewhere = [key for key in all_keys(Config, model_type) if key.split(".")[-1] == location[-1]]
    elsewhere = elsewhere or [key for key in ALIASES if key.split(".")[-1] == location[-1]]
    if elsewhere:
        return f": did you mean {' or '.join(repr(key) for key in elsewhere)}?"
    close = _suggest(".".join(location), ALIASES)
    return close or f": known here are {', '.join(section.model_fields)}"


def _suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {prefix + close[0]!r}?" if close else ""


def all_keys(section: type[BaseModel], model_type: str = "transformer", prefix: str = "") -> list[str]:
    """Every dotted key that a tree with this type of model may have, in order."""
    keys = []
    for name in section.model_fields:
        inner = _section(section, name, model_type)
        if inner is not None:
            keys += all_keys(inner, model_type, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _section(parent: type[BaseModel], name: str, model_type: str) -> type[BaseModel] | None:
    """The class of the section `name` of a section; None where it is a value, or nothing."""
    if parent is Config and name == "model" and isinstance(model_type, str) and model_type in MODELS:
        return config_class(model_type)
    return _section_of(parent.model_fields[name].annotation) if name in parent.model_fields else None


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a section, which may be one that can be left out; a list of several is a value."""
    if get_origin(annotation) is tuple:
        return None
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _display(path: Path) -> str:
    """A path as short as it can be said: relative to here, or to the project."""
    for base in (Path.cwd(), CONFIGS.parent):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)
