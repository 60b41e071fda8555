"""`trireme scaling`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from train.cli.options import number_of

if TYPE_CHECKING:
    from train.scaling.law import Interval
    from train.scaling.report import Report

app = typer.Typer(help="Scaling laws: fit them to runs, predict larger ones.", no_args_is_help=True)
FOLDER = Path("runs/scaling")


@app.command()
def fit(
    points: Annotated[Path, typer.Argument(help="CSV with columns params,tokens,loss and perhaps flops.")],
    out: Annotated[Path, typer.Option(help="A folder for fit.json and the pictures.")] = FOLDER,
    samples: Annotated[int, typer.Option(min=20, help="Samples of the bootstrap.")] = 500,
) -> None:
    """Fit L(N, D) = E + A/N^alpha + B/D^beta to the losses of runs, and how the best size grows with compute.

    Example: `trireme scaling fit runs/ladder/points.csv`
    """
    from train.scaling.points import make_folder, read_points
    from train.scaling.report import make_report, save_report

    read = read_points(points)
    make_folder(out)
    report = make_report(str(points), read, samples)
    from train.scaling.plot import plot_fit

    save_report(report, out / "fit.json")
    _show(report)
    print("\n".join(str(path) for path in (out / "fit.json", *plot_fit(read, report, out))))


@app.command()
def predict(
    flops: Annotated[str | None, typer.Option(help="Compute to spend best, such as 1e21.")] = None,
    params: Annotated[
        str | None, typer.Option(help="With --tokens: the size of one run, such as 7B.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="With --params: the tokens of that run.")] = None,
    fit: Annotated[Path, typer.Option(help="What `trireme scaling fit` wrote.")] = FOLDER / "fit.json",
) -> None:
    """Predict the best size, tokens and loss at a budget, or the loss of one run, each with its 95 % interval.

    Example: `trireme scaling predict --flops 1e21`
    """
    from train.errors import ConfigError
    from train.scaling.report import load_report

    given = {
        "flops": number_of("flops", flops),
        "params": number_of("params", params),
        "tokens": number_of("tokens", tokens),
    }
    known = {name: value for name, value in given.items() if value is not None}
    if set(known) not in ({"flops"}, {"params", "tokens"}):
        raise ConfigError("give --flops, or --params and --tokens: trireme scaling predict --flops 1e21")
    report = load_report(fit)
    compute = known["flops"] if "flops" in known else report.flops_factor * known["params"] * known["tokens"]
    if "flops" in known:
        found = report.predict(compute)
    else:
        found = {"loss": report.predict_loss(known["params"], known["tokens"])}
    print(
        f"{compute:.3g} FLOPs, {compute / report.flops_range[1]:.3g} times the largest run of {report.points}"
    )
    for name, value in found.items():
        print(f"{name:<7}{_written(value, '.4f' if name == 'loss' else '.3g')}")


def _show(report: "Report") -> None:
    print(f"{report.count} runs of {report.flops_range[0]:.2g} to {report.flops_range[1]:.2g} FLOPs")
    print("L(N, D) = E + A/N^alpha + B/D^beta")
    for name, value in report.constants.items():
        print(f"  {name:<6}{_written(value, '.4g')}")
    print(f"residuals of log-loss: {report.residual:.2%} (root mean square)")
    print("the best N grows as C^a, the best D as C^b:")
    for method, growth in report.growth.items():
        if isinstance(growth, str):
            print(f"  {method:<9}: {growth}")
        else:
            print(f"  {method:<9}a {_written(growth.params, '.3f')}   b {_written(growth.tokens, '.3f')}")


def _written(value: "Interval", style: str) -> str:
    return f"{value.value:{style}}  (95 %: {value.low:{style}} to {value.high:{style}})"
