"""What is going to be tried, checked before anything starts. Light to import."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import BaseModelConfig
from train.config import OptimizerConfig
from train.config_file import load_config
from train.errors import ConfigError
from train.verify.arrangements import Arrangement, arrangements, parse
from train.verify.shrink import describe_changes, shrink

OPTIMIZER = {"lr": 1e-2, "eps": 1e-4}
"""A few steps change every weight much, but not one whose gradient is nothing but rounding, as of a key's bias."""


@dataclass(frozen=True)
class Plan:
    """A small model, and the layouts that it is tried at."""

    model: BaseModelConfig
    changes: str
    """What shrinking changed."""
    optimizer: OptimizerConfig
    seed: int
    global_batch_size: int
    arrangements: list[tuple[str, Arrangement]]
    """By name, as it is written."""


def make_plan(config: str, overrides: Sequence[str], layouts: Sequence[str], worlds: str, steps: int) -> Plan:
    """Read the configuration, whose data need not exist.

    layouts: each as `parse` reads it, or `all`, which are those of `worlds`, such as `1,2,4`.

    Raises:
        ConfigError, LayoutError: the user's mistake.
    """
    made_up = ["data.path=made-up", "data.sources=[]", f"run.steps={steps}", "run.tokens=null"]
    loaded = load_config(config, [*made_up, *overrides]).config
    sizes = _world_sizes(worlds)
    written = [] if "all" in layouts else [(text, parse(text)) for text in layouts]
    if written:
        sizes = sorted({arrangement.layout.world_size for _, arrangement in written})
    model = shrink(loaded.model, sizes)
    if not written:
        names = [name for size in sizes for name in arrangements(model, size)]
        written = [(name, parse(name)) for name in names]
    return Plan(
        model,
        describe_changes(loaded.model, model),
        loaded.optimizer.model_copy(update=OPTIMIZER),
        loaded.run.seed,
        2 * max(4, *sizes),
        written,
    )


def _world_sizes(text: str) -> list[int]:
    if not all(size.isdecimal() and int(size) > 0 for size in text.split(",")):
        raise ConfigError(f"--world {text}: give numbers of processes with commas between, such as 1,2,4")
    return sorted({int(size) for size in text.split(",")})
