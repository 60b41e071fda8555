"""The same weights in `transformers` give the same logits, losses and gradients."""

import pytest
import torch

from model.build import build_model
from model.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    PositionalConfig,
)
from model.loss import IGNORE_INDEX
from tests.model.hugging_face import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    gradients,
    rename_gpt2,
    rename_llama,
    rename_mixtral,
)

VOCAB = 96


def tokens_and_targets():
    tokens = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    targets[0, 3] = IGNORE_INDEX
    return tokens, targets


def randomize(model):
    """Every parameter random, norms and biases too, so that no mistake hides behind ones and zeros."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def compare(ours, theirs, rename, loss):
    tokens, targets = tokens_and_targets()
    ours.load_state_dict(rename(theirs.state_dict()), strict=False)
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    got = ours(tokens, targets=targets)[1]
    if loss == "sum":
        got = ours.loss_sum(tokens, targets) / (targets != IGNORE_INDEX).sum()
    got.backward()
    torch.testing.assert_close(got, expected_loss)
    expected_gradients, got_gradients = rename(gradients(theirs)), gradients(ours)
    assert got_gradients.keys() <= expected_gradients.keys()
    for name, gradient in got_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("tied", [True, False])
def test_llama(loss, tied):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=500.0,
            tie_word_embeddings=tied,
        )
    )
    randomize(theirs)
    ours = build_model(
        ModelConfig(
            vocab_size=VOCAB,
            d_model=32,
            num_layers=2,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2),
            positional=PositionalConfig(rope_base=500.0),
            ffn=FeedForwardConfig(d_ff=48),
            tie_embeddings=tied,
        )
    )
    compare(ours, theirs, rename_llama, loss)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_mixtral(loss):
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_theta=500.0,
        )
    )
    randomize(theirs)
    ours = build_model(
        ModelConfig(
            vocab_size=VOCAB,
            d_model=32,
            num_layers=2,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2),
            positional=PositionalConfig(rope_base=500.0),
            ffn=FeedForwardConfig(d_ff=24),
            moe=MoEConfig(num_experts=4, load_balance_loss=0.0),
            tie_embeddings=False,
        )
    )
    assert {name for name, _ in ours.named_parameters()} == rename_mixtral(theirs.state_dict()).keys()
    compare(ours, theirs, rename_mixtral, loss)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_gpt2(loss):
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    randomize(theirs)
    ours = build_model(
        ModelConfig(
            vocab_size=VOCAB,
            d_model=32,
            num_layers=2,
            max_seq_len=24,
            attention=AttentionConfig(variant="mha", num_heads=4, bias=True),
            positional=PositionalConfig(encoding="learned"),
            ffn=FeedForwardConfig(variant="mlp", activation="gelu_tanh", expansion_factor=4.0, bias=True),
            norm=NormConfig(type="layernorm"),
        )
    )
    assert {name for name, _ in ours.named_parameters()} == rename_gpt2(theirs.state_dict()).keys()
    compare(ours, theirs, rename_gpt2, loss)


def test_bf16_strays_no_further_from_fp32_than_theirs():
    """Rotations in fp32 and one rounding per operation: at least as close to the exact logits as Llama's."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    theirs = LlamaForCausalLM(config)
    ours = build_model(
        ModelConfig(
            vocab_size=VOCAB,
            d_model=64,
            num_layers=2,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2),
            ffn=FeedForwardConfig(d_ff=128),
        )
    )
    ours.load_state_dict(rename_llama(theirs.state_dict()), strict=False)
    tokens = torch.randint(VOCAB, (1, 1024), generator=torch.Generator().manual_seed(0))
    ours.bfloat16()
    theirs.bfloat16()
    with torch.no_grad():
        mine, other = ours(tokens).double(), theirs(input_ids=tokens).logits.double()
        exact = ours.double()(tokens)
    assert (mine - exact).norm() <= 1.1 * (other - exact).norm()
