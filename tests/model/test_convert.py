"""Through the tables of model/convert: the logits of transformers' own models, and back again to the last bit."""

from typing import Any

import pytest
import torch

from model.beam import BeamSearch, beam_search
from model.build import build_model
from model.config import ModelConfig
from model.convert.architecture import export_weights, import_weights
from model.convert.choose import ARCHITECTURES, choose, read_config
from model.errors import ConversionError
from model.generate import generate
from model.models import parse_model
from tests.model import hugging_face  # noqa: F401 - mends the import of transformers

SMALL_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.1,
    "rope_theta": 300.0,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SMALL_GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "layer_norm_epsilon": 0.1,
}
SMALL_FALCON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "alibi": False,
    "new_decoder_architecture": False,
    "layer_norm_epsilon": 0.1,
    "rope_theta": 300.0,
}
SMALL_BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 0.1}
SMALL_T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 10,
}
T5S: list[dict[str, Any]] = [
    SMALL_T5,
    SMALL_T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    SMALL_T5 | {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1},
]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL_LLAMA),
    ("llama", SMALL_LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", SMALL_LLAMA | {"rope_scaling": LLAMA3_SCALING, "head_dim": 16}),
    ("mistral", SMALL_LLAMA | {"sliding_window": 5}),
    ("qwen3", SMALL_LLAMA | {"head_dim": 12}),
    ("mixtral", SMALL_LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    ("gpt2", SMALL_GPT2),
    ("falcon", SMALL_FALCON),
    ("falcon", SMALL_FALCON | {"bias": True, "tie_word_embeddings": False}),
    ("bloom", SMALL_BLOOM),
    (
        "bloom",
        SMALL_BLOOM | {"n_head": 6, "hidden_size": 36, "seq_length": 128, "tie_word_embeddings": False},
    ),
]


def their_model(model_type: str, settings: dict[str, Any]) -> Any:
    """A model of transformers with random weights, norms and biases among them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize(("model_type", "settings"), MODELS)
def test_logits_equal_and_weights_come_back(model_type: str, settings: dict[str, Any]) -> None:
    theirs = their_model(model_type, settings)
    architecture, config = read_config(theirs.config.to_dict())
    ours = build_model(config).eval()
    ours.load_state_dict(import_weights(architecture, config, theirs.state_dict()))
    tokens = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)

    chosen, written = choose(config)
    assert chosen is architecture
    again = type(theirs)(type(theirs.config)(**written)).eval()
    exported = export_weights(chosen, config, dict(ours.named_parameters()))
    missing, unexpected = again.load_state_dict(exported, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    again.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", T5S)
@pytest.mark.parametrize("side", ["right", "left"])
def test_t5_with_padded_sources_equals_theirs_and_comes_back(settings: dict[str, Any], side: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**settings, decoder_start_token_id=0)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)
    architecture, config = read_config(theirs.config.to_dict())
    ours = build_model(config).eval()
    ours.load_state_dict(import_weights(architecture, config, theirs.state_dict()))
    source, tokens = torch.randint(1, 61, (3, 17)), torch.randint(1, 61, (3, 15))
    padding = torch.arange(17) >= torch.tensor([[17], [5], [11]])
    padding = padding if side == "right" else padding.flip(1)
    arguments = {"input_ids": source, "attention_mask": (~padding).long(), "decoder_input_ids": tokens}
    with torch.no_grad():
        expected = theirs(**arguments).logits
        got = ours(source, tokens, source_padding=padding)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        start, theirs.generation_config.eos_token_id = torch.zeros(3, 1, dtype=torch.int64), None
        best = beam_search(ours, start, 6, BeamSearch(3), inputs={"source": source}).tokens[:, 0]
        drawn = generate(ours, start, 6, temperature=0, inputs={"source": source})
    for made, beams in ((best, 3), (drawn, 1)):
        # their cache takes a decoder to be as deep as its encoder
        asked = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "use_cache": False}
        same = theirs.generate(source, **asked)
        assert torch.equal(made, same)

    chosen, written = choose(config)
    assert chosen is architecture
    again = T5ForConditionalGeneration(T5Config(**written)).eval()
    exported = export_weights(chosen, config, dict(ours.named_parameters()))
    missing, unexpected = again.load_state_dict(exported, strict=False)
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert not unexpected and set(missing) <= tied
    again.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(again(**arguments).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ({"positional": {"encoding": "rope"}}, "the nearest, t5, lacks model.positional.encoding=rope"),
        (
            {"positional": {"encoding": "relative"}, "ffn": {"variant": "geglu"}},
            "the nearest, t5, lacks model.ffn.variant=geglu",
        ),
    ],
)
def test_encoders_and_decoders_that_t5_does_not_hold(settings: dict[str, Any], lacking: str) -> None:
    sizes: dict[str, Any] = {"type": "encoder_decoder", "vocab_size": 64, "d_model": 32, "num_layers": 2}
    sizes["attention"] = {"variant": "mha", "num_heads": 4}
    with pytest.raises(ConversionError, match=f"{lacking}$"):
        choose(parse_model(sizes | settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention": {"variant": "complex", "num_heads": 4}}, "lacks model.attention.variant=complex"),
        ({"norm": {"placement": "sandwich"}}, "the nearest, llama, lacks model.norm.placement=sandwich"),
        ({"positional": {"encoding": "none"}}, "lacks model.positional.encoding=none"),
        ({"ffn": {"variant": "geglu"}}, "lacks model.ffn.variant=geglu"),
        ({"norm": {"embedding": True}}, "the nearest, llama, lacks model.norm.embedding=True"),
    ],
)
def test_what_no_architecture_holds_is_refused(settings: dict[str, Any], reason: str) -> None:
    config = ModelConfig.model_validate({"vocab_size": 64, "d_model": 32, "num_layers": 2} | settings)
    with pytest.raises(ConversionError, match=reason):
        choose(config)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known here: llama, mistral"),
        ({}, "model_type=None is not known"),
        ({"model_type": "llama"}, "config.json has no 'num_attention_heads'"),
        (SMALL_LLAMA | {"model_type": "llama", "hidden_act": "gelu"}, "hidden_act=gelu: only silu"),
        (SMALL_FALCON | {"model_type": "falcon", "activation": "relu"}, "activation=relu is not known here"),
        ({"model_type": "falcon", "alibi": True}, "alibi=true"),
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "post_layernorm=true"),
    ],
)
def test_configurations_that_are_not_known_are_refused(theirs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        read_config(theirs)


def test_missing_and_misshapen_tensors_are_named() -> None:
    theirs = their_model("llama", SMALL_LLAMA)
    architecture, config = read_config(theirs.config.to_dict())
    tensors = theirs.state_dict()
    with pytest.raises(ConversionError, match="no tensor 'model.norm.weight'"):
        import_weights(architecture, config, {k: v for k, v in tensors.items() if k != "model.norm.weight"})
    with pytest.raises(ConversionError, match=r"model.norm.weight is \(3,\), not \(32,\)"):
        import_weights(architecture, config, tensors | {"model.norm.weight": torch.zeros(3)})


def test_every_architecture_is_tried() -> None:
    assert {model_type for model_type, _ in MODELS} | {"t5"} == {a.model_type for a in ARCHITECTURES}
