"""Beam search against transformers' own, and against every sequence there is."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model.beam import BeamSearch, Hypotheses, beam_search
from model.build import build_model
from model.convert.architecture import import_weights
from model.convert.choose import read_config
from model.generate import generate
from model.image_codes.config import ImageCodesConfig
from model.initialize import initialize
from model.reader import pad_left
from model.transformer import Trunk
from tests.model.test_convert import SMALL_GPT2, SMALL_LLAMA, their_model
from tests.model.variants import config_of, lively, random_tokens

VOCAB = 5


def exhaustive(
    model: Trunk, prompt: list[int], length: int, search: BeamSearch
) -> list[tuple[float, list[int]]]:
    """Scores of all continuations that end in a stop token, or are as long as can be, from the best."""
    found = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(search.vocab_size or VOCAB), repeat=size):
            stops = [token in search.stop_tokens for token in tokens]
            if any(stops[:-1]) or not (stops[-1] or size == length):
                continue
            logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1, : search.vocab_size]
            score = logits.log_softmax(-1)[range(size), list(tokens)].sum().item()
            found.append((score / size**search.length_penalty, list(tokens)))
    return sorted(found, reverse=True)


def continuations(found: Hypotheses, start: int, stop_tokens: tuple[int, ...]) -> list[list[list[int]]]:
    """Of each row and hypothesis, up to the stop token."""

    def cut(tokens: list[int]) -> list[int]:
        end = next((at + 1 for at, token in enumerate(tokens) if token in stop_tokens), len(tokens))
        return tokens[:end]

    return [[cut(tokens) for tokens in row] for row in found.tokens[..., start:].tolist()]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("stop_tokens", [(), (2,), (0, 2)])
def test_with_beams_enough_nothing_better_exists(penalty: float, stop_tokens: tuple[int, ...]) -> None:
    model = lively(config_of({}, vocab_size=VOCAB))
    search = BeamSearch(3**4, penalty, vocab_size=3, stop_tokens=stop_tokens)
    found = beam_search(model, torch.tensor([[4, 1], [3, 3]]), 4, search)
    for row, prompt in enumerate(([4, 1], [3, 3])):
        expected = exhaustive(model, prompt, 4, search)[: search.beams]
        assert continuations(found, 2, stop_tokens)[row][: len(expected)] == [
            tokens for _, tokens in expected
        ]
        scores = torch.tensor([score for score, _ in expected], dtype=torch.float64)
        torch.testing.assert_close(found.scores[row, : len(expected)], scores)
        assert (found.scores[row, len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize(("model_type", "settings"), [("gpt2", SMALL_GPT2), ("llama", SMALL_LLAMA)])
def test_finds_what_transformers_finds(model_type: str, settings: dict[str, Any], penalty: float) -> None:
    theirs = their_model(model_type, settings)
    architecture, config = read_config(theirs.config.to_dict())
    ours = build_model(config)
    assert isinstance(ours, Trunk)
    ours.load_state_dict(import_weights(architecture, config, theirs.state_dict()))
    tokens, padding = pad_left([[5, 6, 7, 8], [9], [3, 4, 3]])
    assert padding is not None
    often = beam_search(ours, tokens, 10, BeamSearch(5)).tokens[:, 0, 7].tolist()
    lengths = set()
    for count, stop_tokens in itertools.product((2, 5), (tuple(often[:1]), tuple(often))):
        expected = theirs.generate(
            tokens,
            attention_mask=(~padding).long(),
            max_new_tokens=10,
            num_beams=count,
            num_return_sequences=count,
            do_sample=False,
            length_penalty=penalty,
            early_stopping="never",
            eos_token_id=list(stop_tokens),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        search = BeamSearch(count, penalty, stop_tokens=stop_tokens)
        found = beam_search(ours, tokens, 10, search, padding=padding)
        their_scores = expected.sequences_scores.unflatten(0, (3, -1))
        torch.testing.assert_close(found.scores, their_scores, atol=1e-4, rtol=1e-4)
        their_found = Hypotheses(expected.sequences.unflatten(0, (3, -1)), their_scores)
        assert continuations(found, 4, stop_tokens) == continuations(their_found, 4, stop_tokens)
        lengths |= {len(tokens) for row in continuations(found, 4, stop_tokens) for tokens in row}
    assert min(lengths) < 10 or penalty > 1, "some found their end, unless length is all"


CACHED: list[dict[str, Any]] = [
    {},
    {"attention.variant": "linear"},
    {"attention.variant": "complex"},
    {"attention.mask_type": "sliding_window", "attention.variant": "gqa"},
    {"attention.mask_type": "local", "positional.encoding": "alibi"},
    {"attention.mask_type": "block_sparse", "attention.pattern": "fixed", "positional.encoding": "learned"},
    {"positional.encoding": "relative"},
]


@pytest.mark.parametrize("choice", CACHED, ids=str)
def test_a_row_is_searched_alike_alone_and_among_others_cached_or_not(choice: dict[str, Any]) -> None:
    model, stop_tokens = lively(config_of(choice)), (5, 9, 11)
    prompts = [random_tokens(model.config, 1, length, seed=length)[0].tolist() for length in (3, 8, 1)]
    tokens, padding = pad_left(prompts)
    search = BeamSearch(3, stop_tokens=stop_tokens)
    alone = [beam_search(model, torch.tensor([prompt]), 10, search) for prompt in prompts]
    for use_cache in (True, False):
        found = beam_search(model, tokens, 10, search, padding=padding, use_cache=use_cache)
        torch.testing.assert_close(found.scores, torch.cat([one.scores for one in alone]))
        assert continuations(found, 8, stop_tokens) == [
            continuations(one, len(prompt), stop_tokens)[0]
            for one, prompt in zip(alone, prompts, strict=True)
        ]


def test_other_inputs_go_with_their_rows() -> None:
    config = ImageCodesConfig(
        vocab_size=20, d_model=16, num_layers=2, max_seq_len=12, num_classes=4, attention={"num_heads": 4}
    )
    model = build_model(config)
    assert isinstance(model, Trunk)
    initialize(model, config, seed=0)
    for parameter in model.parameters():
        parameter.data *= 5
    start, classes = torch.full((4, 1), 19), torch.tensor([2, 0, 1, 3])
    search = BeamSearch(3, vocab_size=19)
    for use_cache in (True, False):
        found = beam_search(model, start, 8, search, inputs={"classes": classes}, use_cache=use_cache)
        assert found.tokens[..., 1:].max() < 19
        for row in range(4):
            alone = beam_search(model, start[:1], 8, search, inputs={"classes": classes[row : row + 1]})
            assert torch.equal(found.tokens[row], alone.tokens[0])
    assert len(found.tokens[:, 0].unique(dim=0)) > 1


def test_one_beam_without_an_end_is_greedy() -> None:
    model = lively(config_of({}))
    prompt = random_tokens(model.config, 3, 4)
    found = beam_search(model, prompt, 9, BeamSearch(1))
    assert torch.equal(found.tokens[:, 0], generate(model, prompt, 9, temperature=0))


def test_stops_as_soon_as_nothing_better_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = lively(config_of({}, vocab_size=VOCAB)), []
    logits = torch.tensor([0.0, 0.0, 6.0, 0.0, 0.0])

    def forward(tokens: Tensor, **others: Any) -> Tensor:
        reads.append(tokens.shape)
        return logits.expand(len(tokens), 1, VOCAB)

    monkeypatch.setattr(model, "forward", forward)
    found = beam_search(
        model, torch.tensor([[1, 1]]), 1000, BeamSearch(1, length_penalty=0.0, stop_tokens=(2,))
    )
    assert len(reads) == 1
    assert found.tokens.tolist() == [[[1, 1, 2]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beams": 0}, "beams=0: it must be 1 or more"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: it must be 1 or more"),
        ({"padding": torch.ones(1, 2, dtype=torch.bool)}, "pad on the left"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    settings = {key: arguments[key] for key in arguments.keys() & {"beams", "vocab_size"}}
    others = {"max_new_tokens": 3} | {key: arguments[key] for key in arguments.keys() - settings.keys()}
    with pytest.raises(ValueError, match=message):
        beam_search(lively(config_of({})), torch.tensor([[1, 2]]), search=BeamSearch(**settings), **others)
