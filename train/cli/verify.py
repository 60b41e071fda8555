"""`trireme verify`"""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from train.verify.verdict import Finding


class Dtype(StrEnum):
    """What is computed in."""

    FP64 = "fp64"
    FP32 = "fp32"
    BF16 = "bf16"


def verify(
    config: Annotated[str, typer.Argument(help="A configuration file, or the name of one below configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value ...", metavar="OVERRIDES")
    ] = None,
    layouts: Annotated[
        list[str] | None,
        typer.Option(help="A layout, such as tp=2,dp_shard=2, as often as wanted; left out or `all`, all."),
    ] = None,
    world: Annotated[str, typer.Option(help="Of all layouts, those of so many processes.")] = "1,2,4",
    dtype: Annotated[Dtype, typer.Option(help="Right layouts agree to 1e-9 in fp64 alone.")] = Dtype.FP64,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5,
) -> None:
    """Prove that every layout computes the run of one process, on this machine's CPU, with a small model of the same
    variants and made-up data.

    Example: `trireme verify tiny --world 2`

    Example: `trireme verify llama3 --layouts tp=2,dp_shard=2 --layouts pp=2,pp_schedule=gpipe`
    """
    from train.verify.command import prepare, run
    from rich.console import Console
    from rich.live import Live

    plan = prepare(config, overrides or [], layouts or ["all"], world, dtype.value, steps)
