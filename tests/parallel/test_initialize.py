"""Each rank generates what it owns, which is that part of the whole model, bit for bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from model.weights import declared_weights
from parallel.apply import lay_out
from parallel.config import ParallelConfig
from parallel.cut import DIM
from parallel.gradients import local
from parallel.layout import resolve_layout
from parallel.mesh import Mesh
from parallel.simulate import simulated_rank
from tests.parallel.parity import engine_config


def part(tensor: Tensor, dim: int, place: int, ranks: int) -> Tensor:
    """One of so many parts, the last of which may be empty."""
    parts = tensor.chunk(ranks, dim)
    return parts[place] if place < len(parts) else tensor.narrow(dim, 0, 0)


def shards_of(config: ModelConfig, rank: int, tp: int, fsdp: int) -> dict[str, Tensor]:
    """What one rank of tp x fsdp generates."""
    with simulated_rank(rank, tp * fsdp):
        parallel = ParallelConfig(tp=tp)
        mesh = Mesh(resolve_layout(parallel, tp * fsdp), "cpu")
        (model,) = lay_out(engine_config(config, parallel, seed=5), mesh, None).models
        return {name: local(parameter.detach()) for name, parameter in model.named_parameters()}


@settings(max_examples=8, deadline=None)
@given(
    tp=st.integers(1, 3),
    fsdp=st.integers(1, 4),
    vocab_size=st.integers(6, 400),
    d_ff=st.integers(6, 300),
    init=st.sampled_from(["gpt2", "xavier"]),
    experts=st.sampled_from([0, 2, 3, 5]),
)
def test_all_shards_together_are_the_whole(
    tp: int, fsdp: int, vocab_size: int, d_ff: int, init: str, experts: int
) -> None:
    sections = {
        "attention": {"variant": "mha", "num_heads": 6, "bias": True},
        "ffn": {"d_ff": d_ff, "bias": True},
    }
    moe = {"num_experts": experts, "top_k": 1, "d_ff": 8} if experts else None
    sizes = {"vocab_size": vocab_size, "d_model": 36, "num_layers": 1, "init": init, "moe": moe}
    config = ModelConfig.model_validate(sizes | sections)
    whole = build_model(config)
    initialize(whole, config, seed=5)
    declared = declared_weights(whole)
    for rank in range(tp * fsdp):
        shards = shards_of(config, rank, tp, fsdp)
        for name, parameter in whole.named_parameters():
            of_experts = declared[name].sharding == "experts"
            dim = None if of_experts else DIM.get(declared[name].sharding)
            cut = parameter if dim is None else part(parameter, dim, rank % tp, tp)
            # of 8 and 36 rows, three ranks can't have equal parts of the former
            uneven = of_experts and experts % fsdp and parameter.shape[1] % fsdp == 0
            expected = part(cut, 1 if uneven else 0, rank // tp, fsdp)
            assert torch.equal(shards[name], expected), (name, rank)
