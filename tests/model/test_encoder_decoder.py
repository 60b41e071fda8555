"""An encoder and a decoder: they learn, pad, cache, count, and each sees what it may."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.beam import BeamSearch, beam_search
from model.build import build_model
from model.count import flops_per_token, parameter_count
from model.encoder_decoder.config import EncoderDecoderConfig
from model.encoder_decoder.model import EncoderDecoder
from model.generate import generate
from model.initialize import initialize
from model.loss import IGNORE_INDEX
from model.weights import declared_weights

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "d_model": 16,
    "num_layers": 2,
    "num_encoder_layers": 3,
    "max_seq_len": 24,
    "max_source_len": 20,
    "attention": {"num_heads": 4},
    "ffn": {"d_ff": 24},
}
LINEAR = {"attention": {"num_heads": 4, "variant": "linear"}}
WINDOW = {"attention": {"num_heads": 4, "mask_type": "sliding_window", "window_size": 3, "bias": True}}
EXPERTS = {"moe": {"num_experts": 4, "d_ff": 12, "every_nth_layer": 2}}
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "t5": {"positional": {"encoding": "relative"}, "ffn": {"variant": "geglu_tanh", "d_ff": 24}},
    "alibi-post": {"positional": {"encoding": "alibi"}, "norm": {"type": "layernorm", "placement": "post"}},
    "learned-sandwich": {"positional": {"encoding": "learned"}, "norm": {"placement": "sandwich"}},
    "sinusoidal-parallel": {"positional": {"encoding": "sinusoidal"}, "parallel_layers": True},
    "none-untied": {"positional": {"encoding": "none"}, "tie_embeddings": False},
    "linear": LINEAR,
    "complex": {"attention": {"num_heads": 4, "variant": "complex", "qk_norm": True}},
    "window": WINDOW,
    "capped": {"attention": {"num_heads": 4, "logit_soft_cap": 2.0}, "norm": {"type": "scalenorm"}},
    "experts": EXPERTS,
}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


def make(choice: dict[str, Any], seed: int = 0) -> EncoderDecoder:
    model = build_model(EncoderDecoderConfig(**SIZES | choice))
    assert isinstance(model, EncoderDecoder)
    initialize(model, model.config, seed)
    return model


def random_batch(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (B, 10), tokens and targets (B, 8)."""
    draw = torch.Generator().manual_seed(0)
    source, rows = (torch.randint(1, 48, (batch, length), generator=draw) for length in (10, 9))
    return source, rows[:, :-1], rows[:, 1:]


@every_choice
def test_overfits_one_batch_and_loads(choice: dict[str, Any]) -> None:
    model = make(choice)
    source, tokens, targets = random_batch()
    padding = torch.zeros_like(source, dtype=torch.bool)
    padding[0, 6:] = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss_sum(source, tokens, targets, source_padding=padding) / targets.numel()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    again = build_model(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(source, tokens), model(source, tokens))


@every_choice
def test_both_losses_agree(choice: dict[str, Any]) -> None:
    model = make(choice).double()
    source, tokens, targets = random_batch()
    targets = targets.clone()
    targets[1, :3] = IGNORE_INDEX
    logits, mean = model(source, tokens, targets)
    torch.testing.assert_close(logits, model(source, tokens))
    summed = model.loss_sum(source, tokens, targets) / 13
    torch.testing.assert_close(summed, mean)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(summed, parameters), torch.autograd.grad(mean, parameters))


@every_choice
def test_the_encoder_sees_all_and_the_decoder_what_came_before(choice: dict[str, Any]) -> None:
    model = make(choice).double()
    source, tokens, _ = random_batch(1)
    logits = model(source, tokens)
    for at in (0, 9):
        changed = source.clone()
        changed[0, at] = source[0, at] % 47 + 1
        assert ((model(changed, tokens) - logits).abs().amax(dim=-1) > 1e-9).all()
    changed = tokens.clone()
    changed[0, 5] = tokens[0, 5] % 47 + 1
    equal = ((model(source, changed) - logits).abs() < 1e-12).all(dim=-1)[0]
    assert equal[:5].all() and not equal[5]


@every_choice
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_its_rows_alone(choice: dict[str, Any], side: str) -> None:
    model = make(choice).double()
    source, tokens, _ = random_batch(3)
    lengths = ((10, 8), (4, 8), (7, 5))
    source_padding, padding = (
        torch.arange(size) >= torch.tensor([length[at] for length in lengths])[:, None]
        for at, size in ((0, 10), (1, 8))
    )
    if side == "left":
        source_padding, padding = source_padding.flip(1), padding.flip(1)
    together = model(source, tokens, source_padding=source_padding, padding=padding)
    for row in range(3):
        here, seen = ~source_padding[row], ~padding[row]
        alone = model(source[row : row + 1, here], tokens[row : row + 1, seen])
        torch.testing.assert_close(together[row : row + 1, seen], alone)


def test_a_source_of_padding_alone_makes_nothing_infinite() -> None:
    model = make({})
    source, tokens, targets = random_batch()
    padding = torch.tensor([[False], [True]]).expand(2, 10)
    model.loss_sum(source, tokens, targets, source_padding=padding).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_choice
def test_cached_generation_is_uncached_generation(choice: dict[str, Any]) -> None:
    model = make(choice, seed=1).double()
    for parameter in model.parameters():
        parameter.data *= 4  # so that the source makes a difference that shows
    source, tokens, _ = random_batch(3)
    padding = torch.arange(10) >= torch.tensor([[10], [4], [7]])
    inputs = {"source": source, "source_padding": padding}
    made = [
        generate(model, tokens[:, :2], 12, temperature=0, use_cache=use, inputs=inputs)
        for use in (True, False)
    ]
    assert torch.equal(*made) and made[0].shape == (3, 14)


@every_choice
def test_beams_with_and_without_cache_and_each_row_its_own(choice: dict[str, Any]) -> None:
    model = make(choice, seed=1).double()
    for parameter in model.parameters():
        parameter.data *= 4
    source, tokens, _ = random_batch(3)
    padding = torch.arange(10) >= torch.tensor([[10], [4], [7]])
    inputs, beams = {"source": source, "source_padding": padding}, BeamSearch(3)
    cached, uncached = (
        beam_search(model, tokens[:, :1], 6, beams, use_cache=use, inputs=inputs) for use in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.scores, uncached.scores)
    row = {"source": source[1:2, :4]}
    alone = beam_search(model, tokens[1:2, :1], 6, beams, inputs=row)
    assert torch.equal(cached.tokens[1:2], alone.tokens)
    (likely,) = model(source[1:2, :4], alone.tokens[:, 0, :-1])[0].log_softmax(-1).unsqueeze(0)
    score = likely.gather(1, alone.tokens[0, 0, 1:, None]).mean()
    assert score.item() == pytest.approx(alone.scores[0, 0].item())


def test_with_a_cache_the_source_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make({})
    source, tokens, _ = random_batch()
    cache, encoded = model.make_cache(8), []
    model.encoder.register_forward_hook(lambda *call: encoded.append(1))
    steps = [model(source, tokens[:, at : at + 1], cache=cache) for at in range(8)]
    assert len(encoded) == 1
    torch.testing.assert_close(torch.cat(steps, dim=1), model(source, tokens))


@every_choice
def test_declares_and_counts(choice: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(EncoderDecoderConfig(**SIZES | choice))
    parameters = dict(model.named_parameters())
    assert declared_weights(model).keys() == parameters.keys()
    count = parameter_count(model.config)
    assert count.total == sum(p.numel() for p in parameters.values())
    tables = ("embedding.weight", "positions.weight", "encoder.positions.weight")
    assert count.embedding == sum(parameters[name].numel() for name in tables if name in parameters)


@pytest.mark.parametrize("lengths", [(20, 24), (20, 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_flops(lengths: tuple[int, int], tied: bool) -> None:
    """torch counts the decoder's whole square, of which causal attention is half."""
    model = make({"tie_embeddings": tied, "d_model": 32, "max_source_len": lengths[0]})
    source, tokens = (torch.randint(48, (2, length)) for length in lengths)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(source, tokens, tokens)[1].backward()
    saved = 3 * 2 * 4 * 32 * lengths[1] / 2
    counted = counter.get_total_flops() / tokens.numel() - saved
    assert flops_per_token(model.config, lengths[1]) == pytest.approx(counted, rel=0.02)


def test_layers_are_the_blocks_of_both() -> None:
    model = make({})
    parts = [list(stack) for stack in (model.encoder.blocks, model.blocks)]
    assert [len(part) for part in parts] == [3, 2] and list(model.layers) == parts[0] + parts[1]


def test_the_load_is_balanced_in_both() -> None:
    gradients = []
    for weight in (0.0, 1.0):
        model = make({"moe": {"num_experts": 4, "d_ff": 12, "load_balance_loss": weight}})
        model.loss_sum(*random_batch()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "router" in name})
    plain, balanced = gradients
    assert any(name.startswith("encoder.") for name in plain)
    assert all((balanced[name] - gradient).abs().max() > 1e-3 for name, gradient in plain.items())


def test_residual_projections_start_smaller_by_their_number() -> None:
    model = make({"d_model": 128, "num_encoder_layers": 8})
    for name, sums in (
        ("blocks.0.cross_attention", 6),
        ("blocks.1.attention", 6),
        ("encoder.blocks.0.attention", 16),
    ):
        weight = model.get_parameter(f"{name}.output.weight")
        assert weight.std().item() == pytest.approx(0.02 / sums**0.5, rel=0.05)


def test_the_embedding_is_shared_and_positions_are_not() -> None:
    names = dict(make(CHOICES["t5"]).named_parameters())
    assert [name for name in names if "embedding" in name] == ["embedding.weight"]
    assert names["positions.weight"].shape == names["encoder.positions.weight"].shape == (4, 32)
    assert "head.weight" not in names and "head.weight" in dict(
        make({"tie_embeddings": False}).named_parameters()
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"attention": {"mask_type": "bidirectional"}}, "bidirectional is the encoder's own"),
        ({"moe": {"first_layer": 1}, "num_encoder_layers": 1}, "model.moe.first_layer=1 .* in the encoder"),
        (
            {"positional": {"encoding": "relative", "relative_buckets": 6}},
            "relative_buckets=6 must be a multiple of 4",
        ),
    ],
)
def test_what_can_not_work_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**SIZES | choice)


def test_config() -> None:
    config = EncoderDecoderConfig(d_model=64)
    assert (config.num_encoder_layers, config.memory_len) == (6, 2048)
    assert config.encoder.attention.mask_type == "bidirectional"
    assert EncoderDecoderConfig(**SIZES | WINDOW).encoder.attention.window_size is None
    assert EncoderDecoderConfig.model_validate(config.model_dump()) == config
