"""`trireme generate`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from train.evaluate_run import LoadedRun
    from train.samples import Choice


def generate(
    run: Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")],
    prompt: Annotated[
        str,
        typer.Option(help="What to go on from, empty: begin a document; of pairs, the source to answer to."),
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token always.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest only.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this mass only.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the random draws.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Flow matching: steps from noise to tokens (32).")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Pictures: a row for each of these classes, such as 0,1,2.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Pictures: so many in each row.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Pictures: the PNG to write.")] = None,
) -> None:
    """Generate text from a run's newest checkpoint, printed as it comes, or pictures into a PNG.

    Example: `trireme generate runs/demo --prompt "def main(" --temperature 0.7`

    Example: `trireme generate runs/digits --classes 0,1,2 --out grid.png`
    """
    from data.dataset import ImageCodesInfo
    from model.flow_matching.model import FlowMatching
    from train.errors import RunError
    from train.evaluate_run import load_run
    from train.samples import REFINEMENTS, Choice

    loaded = load_run(run)
    refines = isinstance(loaded.model, FlowMatching)
    if steps is not None and not refines:
        raise RunError(f"--steps {steps}: {run} generates token by token: leave it out")
    if refines and (top_k is not None or top_p is not None):
        raise RunError(f"--top-k and --top-p: {run} refines all tokens together: leave them out")
    choice = Choice(temperature, top_k, top_p, seed, steps or REFINEMENTS)
    if isinstance(loaded.vocabulary, ImageCodesInfo):
        if prompt:
            raise RunError(f"--prompt {prompt!r}: {run} makes pictures: leave it out")
        _write_pictures(loaded, classes, num_samples, choice, out)
    elif classes is not None or out is not None:
        raise RunError(f"--classes and --out: {run} makes text: leave them out")
    else:
        _print_text(loaded, prompt, max_new_tokens, choice)


def _write_pictures(
    loaded: "LoadedRun", classes: str | None, each: int, choice: "Choice", out: Path | None
) -> None:
    from data.codebook import write_png
    from data.dataset import ImageCodesInfo
    from train.errors import RunError
    from train.samples import make_pictures

    assert isinstance(loaded.vocabulary, ImageCodesInfo)
    if out is None:
        raise RunError("pictures need a file: name it with --out, such as --out grid.png")
    try:
        wanted = None if classes is None else [int(at) for at in classes.split(",")]
    except ValueError:
        raise RunError(f"--classes {classes}: give numbers with commas between, such as 0,1,2") from None
    pixels = make_pictures(loaded.model, loaded.vocabulary, wanted, each, choice, loaded.device)
    try:
        write_png(pixels, out)
    except (OSError, ValueError) as error:
        raise RunError(
            f"--out {out} can't be written ({error}): name a .png in a folder that exists"
        ) from error
    print(out)


def _print_text(loaded: "LoadedRun", prompt: str, max_new_tokens: int, choice: "Choice") -> None:
    from model.flow_matching.model import FlowMatching
    from train.evaluate_run import continuation
    from train.samples import make_text, shown_prompt

    if isinstance(loaded.model, FlowMatching):
        print(make_text(loaded.model, loaded.tokenizer, prompt, max_new_tokens, choice, loaded.device))
        return
    print(shown_prompt(loaded.model, prompt), end="", flush=True)
    for piece in continuation(loaded, prompt, max_new_tokens, choice):
        print(piece, end="", flush=True)
    print()
