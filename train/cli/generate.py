"""`trireme generate`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from train.decoding import Decoding
    from train.evaluate_run import LoadedRun


def generate(
    run: Annotated[str, typer.Argument(help="The folder of a run, such as runs/demo.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to go on from, empty: begin a document; of pairs, the source to answer to. As often as wanted."
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Go on from each line of the input.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens to generate (128).")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Texts for each prompt (1); pictures in each row (8).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Logits are divided by it (0.8); 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this mass only.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample what is at least so many times as probable as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that were seen become less likely.")
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(help="Search for the likeliest text with so many beams, in place of sampling."),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="With --beams: log-probability / length to this power (1) is the score."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text ends before it; as often as wanted.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the random draws.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Flow matching: steps from noise to tokens (32).")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Pictures: a row for each of these classes, such as 0,1,2.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Pictures: the PNG to write.")] = None,
) -> None:
    """Generate text from a run's newest checkpoint, printed as it comes, or pictures into a PNG.

    Example: `trireme generate runs/demo --prompt "def main(" --temperature 0.7 --min-p 0.05`

    Example: `trireme generate runs/demo --prompt "def " --prompt "class " --beams 4 --stop ":"`

    Example: `trireme generate runs/digits --classes 0,1,2 --out grid.png`
    """
    from data.dataset import ImageCodesInfo
    from train.decoding import choose_decoding, refuse
    from train.evaluate_run import load_run
    from train.print_texts import answer_lines, print_texts
    from train.texts import TextSettings

    loaded = load_run(run)
    of_texts = {"prompt": prompt, "interactive": interactive, "max_new_tokens": max_new_tokens, "stop": stop}
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    searching = {"beams": beams, "length_penalty": length_penalty}
    if isinstance(loaded.vocabulary, ImageCodesInfo):
        refuse({**of_texts, **searching}, f"{run} makes pictures")
        decoding = choose_decoding(loaded.model, sampling | {"steps": steps})
        _write_pictures(loaded, classes, num_samples or 8, decoding, seed, out)
        return
    refuse({"classes": classes, "out": out}, f"{run} makes text")
    decoding = choose_decoding(loaded.model, sampling | searching | {"steps": steps})
    settings = TextSettings(decoding, max_new_tokens or 128, num_samples or 1, seed, tuple(stop or ()))
    if interactive:
        refuse({"prompt": prompt}, "--interactive reads prompts from its input")
        answer_lines(loaded, settings)
    else:
        print_texts(loaded, prompt or [""], settings)


def _write_pictures(
    loaded: "LoadedRun", classes: str | None, each: int, decoding: "Decoding", seed: int, out: Path | None
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
    pixels = make_pictures(loaded.model, loaded.vocabulary, wanted, each, decoding, seed, loaded.device)
    try:
        write_png(pixels, out)
    except (OSError, ValueError) as error:
        raise RunError(
            f"--out {out} can't be written ({error}): name a .png in a folder that exists"
        ) from error
    print(out)
