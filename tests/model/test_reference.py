"""The usage examples of the reference systems' documents, executed with small sizes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.count import parameter_count
from model.reference import (
    GPT,
    FlowMatchingTransformer,
    GPTCausal,
    GPTConfig,
    GPTModel,
    Transformer,
    TransformerConfig,
    generate,
)

SMALL: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "max_seq_len": 24}
TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
TARGETS = TOKENS.roll(-1, dims=1)


def test_gpt_causal() -> None:
    model = GPTCausal(**SMALL, dropout=0.1)
    logits, loss = model(TOKENS, targets=TARGETS)
    assert logits.shape == (3, 12, 50) and loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten()))
    loss.backward()
    generated = model.generate(TOKENS[:, :4], max_new_tokens=10, temperature=0.8)
    assert generated.shape == (3, 14) and torch.equal(generated[:, :4], TOKENS[:, :4])


def test_gpt_causal_without_targets_gives_logits() -> None:
    model = GPTCausal(**SMALL)
    assert torch.equal(model(TOKENS), model(TOKENS, targets=TARGETS)[0])


def test_gpt_causal_takes_one_hot_tokens() -> None:
    model = GPTCausal(**SMALL)
    one_hot = F.one_hot(TOKENS, 50)
    torch.testing.assert_close(model(one_hot), model(TOKENS))
    torch.testing.assert_close(model(one_hot.float()), model(TOKENS))


def test_gpt_causal_sees_no_later_token() -> None:
    model = GPTCausal(**SMALL)
    changed = TOKENS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    logits, others = model(TOKENS), model(changed)
    torch.testing.assert_close(logits[:, :7], others[:, :7])
    assert (logits[:, 7:] != others[:, 7:]).any(dim=-1).all()


@pytest.mark.parametrize("constructor", [GPTCausal, FlowMatchingTransformer])
def test_documented_defaults(constructor: type[GPTCausal] | type[FlowMatchingTransformer]) -> None:
    with torch.device("meta"):
        model = constructor(vocab_size=50304)
    config = model.config
    assert (config.d_model, config.num_layers, config.attention.num_heads) == (768, 12, 12)
    assert (config.max_seq_len, config.dropout, config.ffn.activation) == (2048, 0.0, "relu_squared")
    assert (config.norm.type, config.attention.variant) == ("rmsnorm", "mha")
    assert model.loss_func is F.cross_entropy
    flows = isinstance(model, FlowMatchingTransformer)
    assert config.positional.encoding == ("none" if flows else "rope")
    assert config.attention.mask_type == ("bidirectional" if flows else "causal")
    if flows:
        assert model.config.time_embed_dim == 256


def test_a_loss_function_of_ones_own() -> None:
    def twice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * F.cross_entropy(logits, targets)

    model = GPTCausal(**SMALL, loss_func=twice)
    logits, loss = model(TOKENS, targets=TARGETS)
    torch.testing.assert_close(loss, twice(logits.flatten(0, 1), TARGETS.flatten()))
    flow = FlowMatchingTransformer(
        **SMALL, loss_func=lambda logits, targets: (logits - targets).square().mean()
    )
    xt = torch.rand(3, 12, 50).softmax(-1)
    logits, loss = flow(torch.rand(3), xt, targets=xt)
    torch.testing.assert_close(loss, (logits - xt).square().mean())


def test_flow_matching_transformer() -> None:
    model = FlowMatchingTransformer(**SMALL, dropout=0.1, time_embed_dim=16)
    t = torch.rand(3)
    xt = torch.rand(3, 12, 50).softmax(-1)
    targets = F.one_hot(TOKENS, 50).float()
    logits, loss = model(t, xt, targets=targets)
    assert logits.shape == (3, 12, 50)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)))
    loss.backward()
    logits = model.sample(t, xt, temperature=1.0)
    assert logits.shape == (3, 12, 50) and not logits.requires_grad


NAMESPACE = SimpleNamespace(
    n_embd=32,
    num_heads=4,
    n_layers=2,
    vocab_size=100,
    block_size=16,
    dropout=0.1,
    attention_type="flash_attention",
    attention_class="FlashAttention",
    ffn_type="ff_swiglu",
    ffn_class="GatedFeedForward",
    norm_type="rmsnorm",
    norm_class="RMSNorm",
)


def test_gpt_model() -> None:
    model = GPTModel(NAMESPACE)
    assert f"{model.get_num_params():,}" == f"{parameter_count(model.config).total:,}"
    assert model.get_num_params() - model.get_num_params(non_embedding=True) == 16 * 32
    input_ids = torch.randint(0, 100, (1, 10))
    assert model(input_ids).shape == (1, 10, 100)
    assert model(input_ids, input_ids)[1].shape == ()
    assert model.generate(input_ids, 6, temperature=0.9, top_k=5).shape == (1, 16)
    with pytest.raises(ValueError, match="learned positions"):
        model.generate(input_ids, 20)


@pytest.mark.parametrize("attention", ["flash_attention", "linear_attention", "local_window_attention"])
@pytest.mark.parametrize("ffn", ["standard", "ff_swiglu", "moe"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm"])
def test_gpt_model_of_every_component(attention: str, ffn: str, norm: str) -> None:
    settings = {key: value for key, value in vars(NAMESPACE).items() if not key.endswith(("_type", "_class"))}
    settings |= {"attention_type": attention, "ffn_type": ffn, "norm_type": norm, "pos_type": "sinusoidal"}
    if attention == "local_window_attention":
        settings["window_size"] = 4
    model = GPTModel(SimpleNamespace(**settings))
    logits, loss = model(torch.randint(0, 100, (2, 10)), torch.randint(0, 100, (2, 10)))
    loss.backward()
    assert logits.shape == (2, 10, 100) and loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_transformer() -> None:
    model = Transformer(TransformerConfig(vocab_size=257, d_model=64, num_layers=2))
    assert model(TOKENS).shape == (3, 12, 257)
    shown = repr(model).partition("\n")[0]
    for part in ("k parameters", "gqa 8/2 heads", "rope", "swiglu", "rmsnorm pre", "tied"):
        assert part in shown


def test_transformer_config_has_the_documented_defaults() -> None:
    config = TransformerConfig(vocab_size=50257, d_model=512, num_layers=6)
    attention, positional, ffn, norm = config.attention, config.positional, config.ffn, config.norm
    assert (attention.variant, attention.num_heads, attention.num_kv_heads, attention.head_dim) == (
        "gqa",
        8,
        2,
        64,
    )
    assert (attention.dropout, attention.bias, attention.mask_type) == (0.0, False, "causal")
    assert (attention.window_size, attention.kernel) == (None, "auto")
    assert (positional.encoding, positional.rope_base, positional.rope_scaling) == ("rope", 10000.0, None)
    assert (ffn.variant, ffn.expansion_factor, ffn.dropout) == ("swiglu", 2.6667, 0.0)
    assert (ffn.activation, ffn.bias) == ("silu", False)
    assert (norm.type, norm.eps, norm.placement) == ("rmsnorm", 1e-5, "pre")
    assert (config.tie_embeddings, config.parallel_layers, config.dropout) == (True, False, 0.0)
    assert (config.init_std, config.residual_scaled_init) == (0.02, True)
    assert TransformerConfig(attention={"use_flash_attn": True}).attention.kernel == "flash"


def test_gpt_of_pictures() -> None:
    config = GPTConfig(
        vocab_size=100, seq_len=64, embed_dim=32, num_layers=2, class_conditional=True, num_classes=10
    )
    model = GPT(config)
    input_ids, labels = torch.randint(100, (4, 64)), torch.randint(100, (4, 64))
    classes = torch.tensor([0, 3, 9, 3])
    logits, loss = model(input_ids, labels=labels, classes=classes)
    assert logits.shape == (4, 64, 100)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    loss.backward()
    made = generate(model, input_ids[:, :1], 20, temperature=0.9, top_k=50, top_p=0.95, classes=classes)
    assert made.shape == (4, 21)


def test_gpt_of_pictures_without_classes() -> None:
    model = GPT(GPTConfig(vocab_size=20, seq_len=8, embed_dim=16, num_layers=1))
    assert model(torch.zeros(2, 8, dtype=torch.int64)).shape == (2, 8, 20)
    assert generate(model, torch.zeros(2, 1, dtype=torch.int64), 7).shape == (2, 8)


def test_weights_follow_torchs_seed_as_in_gpt2() -> None:
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return GPTModel(NAMESPACE).embedding.weight

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
    assert made(1).std().item() == pytest.approx(0.02, rel=0.1)


def test_configurations_may_be_ours_or_theirs() -> None:
    ours = ModelConfig(vocab_size=30, d_model=16, num_layers=1, attention={"num_heads": 2})
    for config in (ours, {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2}):
        assert GPTModel(config)(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 30)
    with pytest.raises(
        ValueError, match="GPTModel takes a configuration of type transformer, not flow_matching"
    ):
        GPTModel({"type": "FlowMatchingTransformer", "vocab_size": 30})
    with pytest.raises(ValueError, match="GPT takes a configuration of type image_codes, not transformer"):
        GPT(ours)
