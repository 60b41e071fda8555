"""`trireme verify`"""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from parallel.config import Precision
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
        typer.Option(help="A layout, such as tp=2,dp_shard=2, as often as wanted; or `all`, which is meant."),
    ] = None,
    world: Annotated[str, typer.Option(help="Of all layouts, those of so many processes.")] = "1,2,4",
    engines: Annotated[
        str,
        typer.Option(help="Of all layouts, those of these engines: torch, deepspeed (which has no fp64)."),
    ] = "torch",
    dtype: Annotated[Dtype, typer.Option(help="In fp64 right layouts agree to 1e-9, and nothing hides.")] = (
        Dtype.FP64
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5,
) -> None:
    """Prove that every layout computes the run of one process: a small model of the same variants, on this CPU.

    Differences are relative ones, the largest. Exit code 1 where a layout is wrong.

    Example: `trireme verify tiny --world 2`

    Example: `trireme verify tiny --engines deepspeed --dtype fp32`

    Example: `trireme verify llama3 --layouts tp=2,dp_shard=2 --layouts pp=2,pp_schedule=gpipe`
    """
    from rich.live import Live

    from train.cli.console import console
    from train.verify.plan import make_plan

    plan = make_plan(config, overrides or [], layouts or ["all"], world, steps, engines)
    shown = console(markup=True)
    shown.print(f"{config}: {plan.model.type}, made small: {plan.changes}")
    shown.print(
        f"{dtype}, {steps} steps of {plan.global_batch_size} sequences, seed {plan.seed}, against one process"
    )
    from train.verify.verify import verify_plan

    table = _table()
    findings: list[Finding] = []
    with Live(table, console=shown):
        for finding in verify_plan(plan, dtype.value, steps):
            findings.append(finding)
            table.add_row(*_cells(finding, dtype.value))
    for finding in findings:
        if finding.error is not None:
            shown.print(f"{finding.name}: {finding.error}", markup=False)
    failed = sum(bool(finding.wrong(dtype.value)) for finding in findings)
    refused = sum(finding.refused is not None for finding in findings)
    shown.print(f"\n{len(findings) - failed - refused} passed, {failed} failed, {refused} refused")
    if failed:
        raise typer.Exit(1)


def _table() -> "Table":
    from rich.table import Table

    table = Table()
    table.add_column("layout", no_wrap=True)
    for name in ("initial weights", "loss", "gradient norm", "weights", "data order", "resumed elsewhere"):
        table.add_column(name)
    table.add_column("", overflow="fold")
    return table


def _cells(finding: "Finding", precision: "Precision") -> list[str]:
    """A row of the table, what is wrong in red."""
    if finding.refused is not None:
        return [finding.name, *[""] * 6, f"refused: {finding.refused}"]
    wrong = finding.wrong(precision)
    verdict = "[red]FAIL[/]" if wrong else "[green]pass[/]"
    if finding.differences is None:
        return [finding.name, *[""] * 6, f"{verdict}: error, see below"]
    shown = {"initial": "equal" if finding.initial else "differ"}
    found = {name: f"{value:.1e}" for name, value in vars(finding.differences).items()}
    shown |= {name: found[name] for name in ("loss", "grad_norm", "weights")}
    shown |= {"order": "equal" if finding.order else "differs", "resumed": found["resumed"]}
    return [finding.name, *(f"[red]{v}[/]" if name in wrong else v for name, v in shown.items()), verdict]
