"""Every setting against transformers' own, and what can't be."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import Sampling, adjust, sample
from tests.model.test_convert import SMALL_GPT2, their_model


@functools.cache
def their_models() -> dict[float, Any]:
    """By how far their logits are apart."""
    return {scale: _scaled(scale) for scale in (0.5, 5.0)}


def _scaled(scale: float) -> Any:
    model = their_model("gpt2", SMALL_GPT2 | {"tie_word_embeddings": False})
    model.lm_head.weight.data.mul_(scale)
    return model


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0.5, 5.0]),
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.fixed_dictionaries(
        {"temperature": st.floats(0.2, 5.0)},
        optional={
            "repetition_penalty": st.floats(0.2, 4.0),
            "top_k": st.integers(1, 80),
            "top_p": st.floats(0.01, 1.0),
            "min_p": st.floats(0.0, 1.0),
        },
    ),
)
def test_draws_from_what_transformers_draws_from(
    scale: float, prompt: list[int], setting: dict[str, Any]
) -> None:
    tokens = torch.tensor([prompt])
    theirs = their_models()[scale].generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=1,
        do_sample=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **({"top_k": 0} | setting),
    )
    seen = torch.zeros(1, 61, dtype=torch.bool).scatter_(1, tokens, True)
    adjusted = adjust(theirs.logits[0], Sampling(**setting), seen)
    torch.testing.assert_close(adjusted, theirs.scores[0])


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits, seen = torch.tensor([[3.0, 2.0, -1.0]]), torch.tensor([[True, False, False]])
    assert sample(logits, Sampling(temperature=0)).tolist() == [[0]]
    assert sample(logits, Sampling(temperature=0, repetition_penalty=2.0), seen=seen).tolist() == [[1]]
    assert (
        sample(logits, Sampling(temperature=0, vocab_size=1, repetition_penalty=2.0), seen=seen).item() == 0
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0: it must be 0 \(the likeliest token\) or more"),
        ({"top_k": 0}, "top_k=0: it must be 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1: it must be from 0 to 1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: it must be above 0"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_wrong_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Sampling(**setting)
    assert "\n" not in str(caught.value)
