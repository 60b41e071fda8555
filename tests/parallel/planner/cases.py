"""Models and runs that predictions are held against."""

from typing import Any

from model.config import ModelConfig
from parallel.config import ActivationCheckpointConfig, ParallelConfig, Precision
from parallel.planner.facts import Arrangement, RunFacts

LLAMA: dict[str, Any] = {
    "vocab_size": 2048,
    "d_model": 128,
    "num_layers": 4,
    "max_seq_len": 256,
    "tie_embeddings": False,
    "attention": {"variant": "gqa", "num_heads": 8, "num_kv_heads": 4},
    "ffn": {"variant": "swiglu", "d_ff": 352},
}
GPT: dict[str, Any] = {
    "vocab_size": 2048,
    "d_model": 128,
    "num_layers": 4,
    "max_seq_len": 256,
    "attention": {"variant": "mha", "num_heads": 8, "bias": True},
    "positional": {"encoding": "learned"},
    "ffn": {"variant": "mlp", "activation": "gelu", "d_ff": 512, "bias": True},
    "norm": {"type": "layernorm"},
}
MOE = {**LLAMA, "moe": {"num_experts": 8, "top_k": 2, "d_ff": 128}}
SHARED = {
    **LLAMA,
    "moe": {"num_experts": 8, "top_k": 2, "d_ff": 128, "num_shared_experts": 1, "first_layer": 1},
}
WIDE = {**LLAMA, "vocab_size": 16384, "num_layers": 2}
SANDWICH = {**LLAMA, "norm": {"placement": "sandwich"}}
PARALLEL = {**LLAMA, "parallel_layers": True, "positional": {"encoding": "none"}}


def run_of(model: dict[str, Any], precision: Precision = "bf16", sequences: int = 4) -> RunFacts:
    """A run of so many sequences in a step."""
    config = ModelConfig.model_validate(model)
    return RunFacts(config, config.max_seq_len, sequences, precision)


def arranged(micro_batch_size: int = 1, again: str = "none", **parallel: Any) -> Arrangement:
    """A layout."""
    recomputation = ActivationCheckpointConfig.model_validate({"mode": again})
    return Arrangement(
        ParallelConfig.model_validate({"dp_shard": 1, **parallel}), micro_batch_size, recomputation
    )
