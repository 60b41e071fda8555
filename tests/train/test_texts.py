"""Texts of a run, as `trireme generate` prints them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare_pairs import prepare_pairs
from data.tokenizer import Tokenizer
from model.beam import BeamSearch
from model.sampling import Sampling
from parallel.processes import WorkerPool
from tests.train.running import train_here
from train.cli.generate import generate
from train.decoding import Decoding
from train.errors import RunError
from train.evaluate_run import LoadedRun, load_run
from train.texts import TextSettings, WrittenText, continuations

Write = Callable[..., str]


@pytest.fixture(scope="module")
def run(pools: dict[int, WorkerPool], tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of thirty steps."""
    folder = tmp_path_factory.mktemp("runs")
    pools[1].run(train_here, tiny_config, [f"run.dir={folder}", "run.steps=30"])
    return str(folder / "run")


@pytest.fixture(scope="module")
def pair_run(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path_factory: pytest.TempPathFactory
) -> LoadedRun:
    """An encoder and decoder that counts men in letters."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [{"source": f"{n} oars and {n % 7} men", "target": "ABCDEFG"[n % 7] * 3} for n in range(300)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    prepare_pairs([str(folder / "pairs.jsonl")], folder / "set", vocab_size=300, source_len=24, seq_len=8)
    overrides = [f"run.dir={folder}", f"data.path={folder / 'set'}", "model.type=encoder_decoder"]
    pools[1].run(train_here, tiny_config, [*overrides, "run.steps=120"])
    return load_run(str(folder / "run"))


@pytest.fixture
def write(run: str, capsys: pytest.CaptureFixture[str]) -> Write:
    """What the command prints."""

    def printed(*prompts: str, **options: Any) -> str:
        generate(run, list(prompts), **{"max_new_tokens": 24, **options})
        return capsys.readouterr().out

    return printed


def parts_of(printed: str, count: int) -> list[str]:
    """The texts under their headers."""
    texts = []
    for at in range(1, count + 1):
        header = f"--- {at} of {count} ---\n"
        assert printed.startswith(header)
        text, rest, printed = printed[len(header) :].partition(f"--- {at + 1} of {count} ---\n")
        texts.append(text)
        printed = rest + printed
    return texts


def test_a_seed_repeats_its_texts(write: Write) -> None:
    first, again, other = (write("The", seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.startswith("The") and first.endswith("\n")
    several = [write("The", num_samples=3, seed=seed) for seed in (0, 0, 1)]
    assert several[0] == several[1] != several[2]
    texts = parts_of(several[0], 3)
    assert len(set(texts)) == 3 and all(text.startswith("The") for text in texts)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"beams": 3}, {"beams": 3, "length_penalty": 0.0}], ids=str
)
def test_prompts_of_unequal_length_are_answered_as_if_alone(write: Write, options: dict[str, Any]) -> None:
    prompts = ["The trireme was a warship", "I", ""]
    together = parts_of(write(*prompts, **options), 3)
    assert together == [write(prompt, **options) for prompt in prompts]


@pytest.mark.parametrize("decoding", [Sampling(temperature=0), BeamSearch(3)], ids=str)
def test_sources_of_unequal_length_are_answered_as_if_alone(pair_run: LoadedRun, decoding: Decoding) -> None:
    def answers(*sources: str) -> list[str]:
        wanted = TextSettings(decoding, 6)
        pieces = continuations(pair_run.model, pair_run.tokenizer, sources, wanted, pair_run.device)
        return ["".join(parts) for parts in zip(*pieces, strict=True)]

    sources = ["12 oars", "3", "", "400 men and a piper"]
    assert answers(*sources) == [answers(source)[0] for source in sources]
    assert len(set(answers(*sources))) > 1


def test_the_best_of_the_beams_come_first(write: Write) -> None:
    best = write("The", beams=4)
    texts = parts_of(write("The", beams=4, num_samples=3), 3)
    assert texts[0] == best and len(set(texts)) == 3


def test_lines_of_the_input_are_answered(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write("The") + write("Its crew")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\nIts crew\n"))
    assert write(interactive=True) == expected


def test_a_text_ends_before_a_stop_text(write: Write) -> None:
    whole = write("The", temperature=0.0)
    new = whole.removeprefix("The").removesuffix("\n")
    stop = new[len(new) // 2 : len(new) // 2 + 3]
    cut = "The" + new[: new.index(stop)] + "\n"
    assert len(stop) == 3 and cut != whole
    assert write("The", temperature=0.0, stop=["no such text", stop]) == cut
    assert parts_of(write("The", "The", temperature=0.0, stop=[stop]), 2) == [cut, cut]
    assert write("The", beams=1, stop=[new[0]]) in {"The\n", write("The", beams=1)}


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc\n é", max_size=20),
    st.lists(st.text("abc\n é", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_texts_end_a_text_wherever_its_tokens_are_cut(
    dataset: Path, text: str, stops: list[str], has_end: bool
) -> None:
    tokenizer = Tokenizer.load(dataset / "tokenizer.model")
    written = WrittenText(tokenizer, tuple(stops))
    tokens = tokenizer.encode(text) + ([tokenizer.eos_id, *tokenizer.encode("abc")] if has_end else [])
    pieces = [written.add([token]) for token in tokens] + [written.finish()]
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(found, default=(0, len(text)))[1]], (
        "cut before what is complete first"
    )
    assert written.ended == (has_end or bool(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"beams": 2, "temperature": 0.5},
            "--temperature: --beams searches for what is likeliest: leave it out",
        ),
        ({"beams": 2, "top_k": 5, "min_p": 0.1}, "--top-k and --min-p: --beams .*: leave them out"),
        ({"beams": 2, "num_samples": 3}, "--num-samples 3: --beams 2 finds no more than 2"),
        ({"beams": 0}, "beams=0: it must be 1 or more"),
        ({"length_penalty": 2.0}, "--length-penalty: without --beams this model generates token by token"),
        ({"steps": 3}, "--steps: without --beams this model generates token by token"),
        ({"min_p": 2.0}, "min_p=2.0: it must be from 0 to 1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0: it must be above 0"),
        ({"stop": [""]}, "--stop '': give a text"),
        ({"interactive": True, "prompt": ["x"]}, "--prompt: --interactive reads prompts from its input"),
        ({"classes": "1"}, "--classes: .* makes text: leave it out"),
    ],
)
def test_what_has_no_effect_or_can_not_be_is_refused(run: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        generate(run, **options)
    assert "\n" not in str(caught.value)
