"""`trireme export` and `trireme import`"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export_(
    run: Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    to: Annotated[Literal["hf"], typer.Option(help="hf: a folder that transformers loads.")] = "hf",
) -> None:
    """Write a run's newest checkpoint for another library.

    Example: `trireme export runs/demo --to hf --out demo-hf`
    """
    from train.convert_run import export_run

    print(f"{out}: {export_run(run, out)}")


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder that transformers' save_pretrained or DeepSpeed's save_checkpoint wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder to make, such as runs/llama.")],
    data: Annotated[str, typer.Option(help="The data set that the run will train on.")] = "datasets/imported",
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, where it isn't in the folder.")
    ] = None,
) -> None:
    """Make a run of a model of another library, to generate from or to train on.

    Example: `trireme import llama-hf --out runs/llama`
    """
    from parallel.processes import end_process
    from train.convert_run import import_run

    imported = import_run(source, out, data, config)
    model = imported.model
    print(f"{out}: {model.num_layers} layers of {model.d_model}, vocabulary {model.vocab_size}")
    print(f"weights: {imported.weights}")
    print(f"next: trireme generate {out}, or trireme train {out}/config.yaml data.path={data} run.steps=1000")
    end_process()
