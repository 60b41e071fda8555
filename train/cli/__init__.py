"""The command line. Commands import what they need when they run, so that `trireme --help` is quick."""

import typer

from train.cli import (
    checkpoint,
    config,
    convert,
    evaluate,
    generate,
    jobs,
    ladder,
    plan,
    plot,
    prepare,
    scaling,
    submit,
    train,
    verify,
)
from train.errors import told_in_one_line

app = typer.Typer(
    help="Trireme: distributed pretraining in which every layout proves itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(prepare.prepare)
app.command()(train.train)
app.command()(submit.submit)
for command in (jobs.jobs, jobs.logs, jobs.cancel, jobs.tensorboard):
    app.command()(command)
app.command()(generate.generate)
app.command()(verify.verify)
app.command()(evaluate.evaluate)
app.command()(plot.plot)
app.command()(plan.plan)
app.command()(ladder.ladder)
app.command("export")(convert.export_)
app.command("import")(convert.import_)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(config.app, name="config")
app.add_typer(scaling.app, name="scaling")


def main() -> None:
    """The `trireme` command."""
    with told_in_one_line():
        app()
