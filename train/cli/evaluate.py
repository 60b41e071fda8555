"""`trireme evaluate`"""

from typing import Annotated

import typer


def evaluate(
    run: Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")],
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Only so many sequences, evenly spread.")
    ] = None,
) -> None:
    """Measure the loss of a run's newest checkpoint on the validation split.

    Example: `trireme evaluate runs/demo`
    """
    from parallel.processes import end_process
    from train.evaluate_run import evaluate_run

    result = evaluate_run(run, sequences)
    print(f"step {result.step}  validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}")
    end_process()
