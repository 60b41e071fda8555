"""`trireme config`"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from train.config import Config

app = typer.Typer(help="Look at configurations.", no_args_is_help=True)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="A configuration file, or the name of one below configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value ...", metavar="OVERRIDES")
    ] = None,
) -> None:
    """Print every key with its value and where that came from.

    Example: `trireme config show tiny data.path=datasets/demo optimizer.lr=1e-3`
    """
    from train.config_file import load_config

    loaded = load_config(config, overrides or [])
    rows = [
        (f"{key}: {_yaml(value)}", loaded.sources.get(key, "default"))
        for key, value in _leaves(loaded.config.model_dump(mode="json"))
    ]
    width = max(len(text) for text, _ in rows)
    for text, source in rows:
        print(f"{text:<{width}}  # {source}")
    if loaded.config.parallel.engine == "deepspeed":
        _show_deepspeed(loaded.config)


def _show_deepspeed(config: "Config") -> None:
    """What DeepSpeed is given; how much is accumulated depends on the number of processes."""
    import json

    from parallel.layout import resolve_layout
    from train.resolve import deepspeed_config, wanted_world_size

    layout = resolve_layout(config.parallel, wanted_world_size(config))
    print(f"\n# DeepSpeed's configuration, for {layout.world_size} process(es):")
    print(json.dumps(deepspeed_config(config, layout), indent=2))


@app.command("list")
def list_configs() -> None:
    """Name the configurations that come with the project.

    Example: `trireme config list`
    """
    from train.config_file import CONFIGS, all_configs

    for path in all_configs():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        about = first.removeprefix("#").strip() if first.startswith("#") else ""
        print(f"{path.relative_to(CONFIGS.parent)!s:<32} {about}")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its value; a section that is left out is one."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _yaml(value: object) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
