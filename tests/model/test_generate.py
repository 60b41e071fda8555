"""Sampling against its definitions, and the loop around it."""

import pytest
import torch

from model.generate import generate, stream
from model.reader import pad_left
from model.sampling import Sampling, sample
from tests.model.variants import build, config_of, random_tokens

CONFIG = config_of({})


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, seed=3).double()


@pytest.fixture(scope="module")
def prompt():
    return random_tokens(CONFIG, 2, 5)


def test_greedy_is_a_loop_of_argmax(model, prompt):
    expected = prompt
    for _ in range(9):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generate(model, prompt, 9, temperature=0), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_seed_repeats_itself(model, prompt, use_cache):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 9, top_k=20, top_p=0.9, generator=generator, use_cache=use_cache)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_stream_yields_what_generate_returns(model, prompt):
    new = list(stream(model, prompt, 6, Sampling(temperature=0)))
    assert [tuple(token.shape) for token in new] == [(2, 1)] * 6
    assert torch.equal(torch.cat((prompt, *new), 1), generate(model, prompt, 6, temperature=0))


def test_stop_token_ends_rows_and_then_the_loop(model, prompt):
    free = generate(model, prompt, 12, temperature=0)[:, 5:]
    stop = free[0, 2].item()
    stopped = generate(model, prompt, 12, temperature=0, stop_tokens=(stop,))[:, 5:]
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row == (expected[:end] + [stop] * 12)[: len(row)]
    both = (stop, free[1, 4].item())
    for row, expected in zip(
        generate(model, prompt, 12, temperature=0, stop_tokens=both)[:, 5:].tolist(),
        free.tolist(),
        strict=True,
    ):
        end = min(expected.index(token) for token in both if token in expected)
        assert row == (expected[: end + 1] + [expected[end]] * 12)[: len(row)]
    alone = generate(model, prompt[:1], 12, temperature=0, stop_tokens=(stop,))
    assert alone.shape[1] == 5 + free[0].tolist().index(stop) + 1


def test_dropout_is_off_and_the_mode_kept(prompt):
    model = build(config_of({}, dropout=0.5)).train()
    first, second = (generate(model, prompt, 9, temperature=0) for _ in range(2))
    assert torch.equal(first, second) and model.training


def test_past_max_seq_len_where_positions_go_on(model):
    long = random_tokens(CONFIG, 1, CONFIG.max_seq_len + 3)
    assert generate(model, long, 2).shape[1] == CONFIG.max_seq_len + 5


def test_learned_positions_end():
    model = build(config_of({"positional.encoding": "learned"}))
    prompt = random_tokens(CONFIG, 1, 30)
    assert generate(model, prompt, 3).shape == (1, 33), "the last token is made, and needs no position"
    with pytest.raises(ValueError, match=r"34 tokens, past the 32 learned positions .*max_seq_len"):
        stream(model, prompt, 4, Sampling())
    with pytest.raises(ValueError, match=r"33 tokens goes past the 32 learned positions"):
        model(random_tokens(CONFIG, 1, 33))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: it must be 0 or more"),
        (
            {"padding": torch.zeros(2, 4, dtype=torch.bool)},
            r"padding \(2, 4\) must have the prompt's shape \(2, 5\)",
        ),
        ({"padding": torch.ones(2, 5, dtype=torch.bool)}, "pad on the left, as pad_left does"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"not \(1, 0\)"),
    ],
)
def test_wrong_arguments(model, prompt, options, words):
    with pytest.raises(ValueError, match=words):
        generate(**{"model": model, "tokens": prompt, "max_new_tokens": 2, **options})


def test_unknown_settings(model, prompt):
    with pytest.raises(TypeError, match="top_n"):
        generate(model, prompt, 2, top_n=3)


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_of_the_prompt_and_made_ones_are_penalized(model, use_cache):
    prompt = random_tokens(CONFIG, 2, 5)
    made = generate(model, prompt, 20, temperature=0, repetition_penalty=1e9, use_cache=use_cache)
    for row in made:  # as long as there are tokens with positive logits that were not seen
        new = row[5:].tolist()
        assert len(set(new)) == 20 and not set(new) & set(row[:5].tolist())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("more", [{}, {"stop_tokens": (7, 9, 11)}, {"repetition_penalty": 1e9}], ids=str)
def test_prompts_of_unequal_length_are_continued_as_if_alone(model, use_cache, more):
    prompts = [random_tokens(CONFIG, 1, length, seed=length)[0].tolist() for length in (3, 9, 1)]
    tokens, padding = pad_left(prompts)
    assert tokens.shape == (3, 9) and padding.sum(1).tolist() == [6, 0, 8]
    settings = {"temperature": 0, "use_cache": use_cache} | more
    made = generate(model, tokens, 20, padding=padding, **settings)
    for row, prompt in zip(made, prompts, strict=True):
        alone = generate(model, torch.tensor([prompt]), 20, **settings)[0, len(prompt) :]
        assert torch.equal(row[9 : 9 + len(alone)], alone)


def test_padding_to_the_left():
    assert pad_left([[4, 5], [6, 7]])[1] is None
    for wrong in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt must have at least one token"):
            pad_left(wrong)


def naive_probabilities(logits, temperature, top_k, top_p):
    """One row, by the definitions, in Python."""
    exponentials = [2.718281828459045 ** (value / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: -exponentials[i])[: top_k or len(logits)]
    total = sum(exponentials[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += exponentials[i] / total
        if top_p is not None and reached >= top_p:
            break
    total = sum(exponentials[i] for i in kept)
    return [exponentials[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.8, 1.0])
def test_frequencies_are_those_of_the_definition(temperature, top_k, top_p):
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = logits.repeat_interleave(4000, 0)
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = sample(many, sampling, generator=generator)
    for row, tokens in zip(logits, drawn.reshape(2, 4000), strict=True):
        expected = torch.tensor(naive_probabilities(row.tolist(), temperature, top_k, top_p))
        frequencies = tokens.bincount(minlength=9) / 4000
        assert torch.equal(frequencies > 0, expected > 0) or (expected[frequencies == 0] < 2e-3).all()
        assert not frequencies[expected == 0].any()
        assert (frequencies - expected).abs().max() < 0.035


def test_half_precision_logits_are_sampled_in_fp32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(2000, -1), Sampling(top_p=0.5), generator=generator)
    assert len(drawn.unique()) > 500


def test_only_tokens_below_vocab_size_are_drawn(model):
    start = random_tokens(CONFIG, 3, 4)
    assert (generate(model, start, 12, temperature=5.0, vocab_size=7)[:, 4:] < 7).all()
