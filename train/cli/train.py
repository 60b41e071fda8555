"""`trireme train`"""

from typing import Annotated

import typer


def train(
    config: Annotated[str, typer.Argument(help="A configuration file, or the name of one below configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value ...", metavar="OVERRIDES")
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="After a failure, start all processes again from the newest checkpoint, so often."
        ),
    ] = 0,
    elastic: Annotated[
        bool,
        typer.Option(
            "--elastic",
            help="With --max-restarts: leave out a process that keeps dying, as when its device is gone, and go on "
            "with fewer data-parallel ranks; the global batch stays.",
        ),
    ] = False,
) -> None:
    """Train a model, or go on with a run that was interrupted.

    Starts as many processes as the layout needs. Under torchrun, use `torchrun ... -m train CONFIG` instead.

    Example: `trireme train configs/demo.yaml run.name=wide model.d_model=512`
    """
    from train.launch import launch

    launch(config, overrides or [], max_restarts, elastic)
