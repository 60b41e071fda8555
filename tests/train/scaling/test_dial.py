"""One number sets the rest of a configuration."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.count import flops_per_token, parameter_count
from train.config import Config
from train.config_file import load_config
from train.errors import ConfigError
from train.run_folder import to_yaml
from train.scaling.recommend import batch_tokens, peak_learning_rate

BIG = ("dial", "data.path=x", "model.vocab_size=32768", "model.max_seq_len=2048")


def load(name: str, *overrides: str) -> Config:
    return load_config(name, overrides).config


@given(st.floats(6, 12))
@settings(max_examples=15, deadline=None)
def test_any_size(exponent: float) -> None:
    config = load(*BIG, "model.vocab_size=4096", f"dial.params={10**exponent:.0f}")
    assert parameter_count(config.model).total == pytest.approx(10**exponent, rel=0.2)
    assert config.run.tokens == round(20 * parameter_count(config.model).total)
    assert 28 <= config.model.d_model / config.model.num_layers <= 260


@pytest.mark.parametrize("flops", [1e18, 1e20, 1e23])
def test_a_budget_is_spent(flops: float) -> None:
    config = load(*BIG, f"dial.flops={flops}")
    params, per_token = parameter_count(config.model).total, flops_per_token(config.model, 2048)
    assert config.run.tokens is not None
    assert config.run.tokens * per_token == pytest.approx(flops, rel=1e-6)
    assert config.run.tokens / params == pytest.approx(20, rel=0.2)
    assert config.data.global_batch_size * 2048 == pytest.approx(batch_tokens(flops), rel=0.5)
    assert config.optimizer.lr == pytest.approx(peak_learning_rate(flops), rel=0.01)
    assert config.dial is not None and "dial:" not in to_yaml(config)


def test_depth_and_size_with_a_budget() -> None:
    deep = load(*BIG, "dial.depth=24")
    assert (deep.model.num_layers, deep.model.d_model, deep.model.attention.head_dim) == (24, 2048, 128)
    small = load(*BIG, "dial.params=100M", "dial.flops=1e20")
    assert small.run.tokens == pytest.approx(1e20 / flops_per_token(small.model, 2048))


def test_the_laws_are_those_of_the_runs_that_were_published() -> None:
    """DeepSeek LLM's own 7B and 67B (table 2), on 2 T tokens and by their FLOPs of a token."""
    for flops, sequences, rate in ((4.3e10 * 2e12, 2304, 4.2e-4), (4.1e11 * 2e12, 4608, 3.2e-4)):
        assert batch_tokens(flops) == pytest.approx(sequences * 4096, rel=0.05)
        assert peak_learning_rate(flops) == pytest.approx(rate, rel=0.03)


def test_small_budgets_have_the_rate_of_the_smallest_that_the_law_knows() -> None:
    assert peak_learning_rate(1e12) == peak_learning_rate(1e17) > peak_learning_rate(1e18)


def test_what_is_said_beside_or_after_the_dial_stays(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: llama3\ndata: {path: x}\ndial: {params: 300M}\noptimizer: {lr: 1.0e-3}\n")
    config = load(str(child), "schedule.warmup_steps=7")
    assert config.optimizer.lr == 1e-3 and config.schedule.warmup_steps == 7
    assert config.model.num_layers < 32 and config.data.global_batch_size < 512, "llama3 was said before"
    assert load(str(child), "dial.params=30M").optimizer.lr != 1e-3, "the dial was turned after it"
    assert load(str(child), "run.steps=3").run.tokens is None
    assert load("demo", "dial.params=3M", "model.vocab_size=4096").run.steps is None


def test_other_models_keep_their_parts() -> None:
    experts = load("mixtral", "data.path=x", "dial.params=1B").model
    assert experts.moe.num_experts == 8 and experts.attention.num_kv_heads * 4 == experts.attention.num_heads
    assert parameter_count(experts).active == pytest.approx(1e9, rel=0.2)
    assert experts.moe.d_ff / experts.d_model == pytest.approx(3.5, rel=0.05)
    assert load("palm", "data.path=x", "dial.params=1B").model.attention.num_kv_heads == 1
    assert load("deepseek_moe", "data.path=x", "dial.params=500M").model.moe.first_layer == 1


def test_each_value_says_why() -> None:
    sources = load_config(BIG[0], [*BIG[1:], "dial.params=300M"]).sources
    assert sources["model.num_layers"].startswith("dial.params=300M: ")
    assert "20 for each of" in sources["run.tokens"] and "DeepSeek LLM" in sources["optimizer.lr"]
    assert sources["model.vocab_size"] == "command line"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dial.parms=3M"], r"unknown key 'dial.parms': did you mean 'dial.params'\?"),
        (["dial.params=lots"], "'lots' is not a positive number: write 300M"),
        (["dial.params=-3M"], "'-3M' is not a positive number"),
        (["dial.params=3M", "dial.depth=4"], "both set the model's size: keep one"),
        (["dial.params=null"], "dial sets nothing: give dial.params=300M"),
        (
            ["dial.params=1K"],
            r"dial.params=1K with model.vocab_size=4096 is out of reach: the nearest that such a model can have is",
        ),
        (
            ["dial.params=3M", "model.d_model=64"],
            "model.d_model=64 and dial.params=3M both set the model's size",
        ),
        (["dial.params=3M", "model.vocab_size=null"], "must know the vocabulary: set model.vocab_size"),
        (["dial.params=3M", "model.type=encoder_decoder"], "can't size a model of type encoder_decoder"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load("dial", *overrides)
    assert "\n" not in str(caught.value)


def test_of_two_ends_the_later_one_counts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {path: x}\nrun: {tokens: 1000}\n")
    assert load(str(tmp_path / "a.yaml"), "run.steps=3").run.tokens is None
    with pytest.raises(ConfigError, match="run.steps and run.tokens are both given"):
        load(str(tmp_path / "a.yaml"), "run.steps=3", "run.tokens=4")
