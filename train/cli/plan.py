"""`trireme plan`"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from train.cli.options import number_of

if TYPE_CHECKING:
    from rich.table import Table

    from parallel.planner.estimate import Estimate
    from train.plan import Plan, Training


class LayoutChoice(StrEnum):
    """Which layout is planned."""

    SEARCH = "search"
    GIVEN = "given"


def plan(
    config: Annotated[str, typer.Argument(help="A configuration file, or the name of one below configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value ...", metavar="OVERRIDES")
    ] = None,
    *,
    gpus: Annotated[int, typer.Option(min=1, help="Devices, each with one process.")],
    gpu: Annotated[
        str, typer.Option(help="Which, by its name in configs/hardware/, or a YAML file like these.")
    ] = "h100-80gb",
    flops: Annotated[str | None, typer.Option(help="Compute to spend, such as 1e24.")] = None,
    days: Annotated[float | None, typer.Option(help="Time to spend.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, such as 1T.")] = None,
    layout: Annotated[
        LayoutChoice, typer.Option(help="The fastest that fits, or that of the configuration.")
    ] = LayoutChoice.SEARCH,
    picture: Annotated[Path | None, typer.Option(help="Draw memory, layout and step into this file.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Take a step as one rank of the layout, and compare.")
    ] = False,
) -> None:
    """Say what a run will take before it is started: the best layout, memory, time, cost.

    Example: `trireme plan 405b --gpus 4096 --gpu h100-80gb`

    Example: `trireme plan 7b --gpus 64 --gpu a100-80gb --days 30 --picture plan.png`

    Example: `trireme plan 7b parallel.tp=2 --gpus 8 --layout given`

    Example: `trireme plan 70b parallel.tp=8 --gpus 4096 --layout given --simulate`
    """
    from parallel.planner.hardware import load_device
    from train.plan import Budget, load_for_plan, make_plan

    budget = Budget(number_of("flops", flops), _positive_days(days), number_of("tokens", tokens))
    device = load_device(gpu)
    loaded = load_for_plan(config, overrides or [])
    made = make_plan(loaded, gpus, device, budget, as_given=layout is LayoutChoice.GIVEN)
    _show(config, made)
    if picture is not None:
        from train.plan_picture import draw_plan

        print(draw_plan(config, made, picture))
    if simulate:
        from train.cli.simulated import show_simulated

        show_simulated(made.best, loaded.optimizer)


def _show(name: str, made: "Plan") -> None:
    from model.count import parameter_count
    from train.cli.console import console
    from train.counts import format_count
    from train.plan import format_seconds

    best = made.best
    run, layout, device = best.run, best.arrangement.layout, best.device
    counts = parameter_count(run.model)
    active = f" ({format_count(counts.active)} active)" if counts.active != counts.total else ""
    print(
        f"{name}: {format_count(counts.total)} parameters{active}, {run.precision}, {run.global_batch_size} sequences "
        f"of {run.seq_len} tokens in a step\n{layout.world_size} x {device.name}: {_described(best)}"
    )
    print(f"  {' '.join(made.pasted)}\n")
    memory, time = best.memory, best.time
    if not best.fits:
        print("this layout doesn't fit: leave out --layout given for one that does")
    print(
        f"memory  {memory.total / 1e9:.1f} GB of {device.memory_bytes / 1e9:.1f} on a device: {memory.in_gb}"
    )
    if memory.host:
        print(f"host    {memory.host / 1e9:.1f} GB of its memory for each device")
    took = (
        f"{name} {format_seconds(part)}" for name, part in time.parts.items() if part >= time.total / 1000
    )
    print(f"step    {format_seconds(time.total)}: {', '.join(took)}")
    print(
        f"speed   {best.tokens_per_second:,.0f} tokens/s, {best.tokens_per_second_per_device:,.0f} a device, "
        f"{best.utilization:.1%} of the peak (MFU)"
    )
    _show_training(made.training)
    if made.rivals:
        print(f"\nNext best of {made.weighed} that were weighed")
        console().print(_rivals(made))


def _show_training(training: "Training") -> None:
    from model.count import parameter_count
    from train.counts import format_count

    params, tokens = training.optimum
    ratio = training.tokens / parameter_count(training.best.run.model).active
    print(
        f"run     {format_count(training.tokens)} tokens, {training.flops:.3g} FLOPs: {_number(training.days)} days, "
        f"{_number(training.device_hours)} GPU-hours, ${_number(training.dollars)}, "
        f"{_number(training.megawatt_hours)} MWh"
    )
    print(
        f"best    {format_count(params)} parameters on {format_count(tokens)} tokens for as many FLOPs; here it is "
        f"{ratio:.3g} tokens a parameter"
    )


def _number(value: float) -> str:
    """Three digits of a small one, all of a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _described(found: "Estimate") -> str:
    arrangement = found.arrangement
    parallel, again = arrangement.parallel, arrangement.activation_checkpoint
    words = [str(arrangement.layout)]
    if parallel.pp > 1:
        stages = f" of {parallel.stages_per_rank} stages" if (parallel.stages_per_rank or 1) > 1 else ""
        words.append(f"{parallel.pp_schedule}{stages}")
    elif parallel.engine == "deepspeed":
        words.append(f"ZeRO stage {parallel.deepspeed.stage}")
    elif not parallel.reshard_after_forward:
        words.append("weights stay gathered")
    if arrangement.offloads:
        words.append("offloaded")
    if arrangement.in_ring:
        words.append("cp in a ring")
    words.append(f"micro-batches of {arrangement.micro_batch_size}")
    every = f" {again.n}" if again.mode == "every_nth" else ""
    words.append(f"recompute {again.mode}{every}")
    return ", ".join(words)


def _rivals(made: "Plan") -> "Table":
    from rich.table import Table

    from parallel.planner.estimate import ROOM
    from train.plan import format_seconds, why_it_loses

    table = Table("layout", "step", "memory", "why it loses")
    for rival in made.rivals:
        reason = why_it_loses(rival, made.best)
        table.add_row(
            _described(rival), format_seconds(rival.time.total), f"{rival.memory.total / 1e9:.1f} GB", reason
        )
    room = made.best.device.memory_bytes * ROOM / 1e9
    for large in made.too_large[:3]:
        size = large.memory.total / 1e9
        table.add_row(
            _described(large),
            format_seconds(large.time.total),
            f"{size:.1f} GB",
            f"more than {room:.1f} GB; what keeps less is slower",
        )
    return table


def _positive_days(days: float | None) -> float | None:
    from train.errors import ConfigError

    if days is not None and not 0 < days < float("inf"):
        raise ConfigError(f"--days {days:g} is not a positive number of days: give 30, or 0.5")
    return days
