"""`trireme generate`"""

from typing import Annotated

import typer


def generate(
    run: Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")],
    prompt: Annotated[str, typer.Option(help="What to go on from; empty: begin a document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token always.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest only.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this mass only.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the random draws.")] = 0,
) -> None:
    """Generate text from a run's newest checkpoint, printed as it comes.

    Example: `trireme generate runs/demo --prompt "def main(" --temperature 0.7`
    """
    from train.evaluate_run import continuation, load_run

    loaded = load_run(run)
    print(prompt, end="", flush=True)
    pieces = continuation(
        loaded, prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
