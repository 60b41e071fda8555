"""The 70B preset on thousands of simulated ranks: places, stages and shards are those that arithmetic gives."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import product
from math import prod

import pytest
import torch.distributed as dist

from model.config import ModelConfig
from model.count import parameter_count
from parallel.apply import build_shards
from parallel.config import ParallelConfig
from parallel.context import context_of
from parallel.fit import check_fit
from parallel.gradients import local
from parallel.layout import Layout, resolve_layout
from parallel.mesh import Mesh
from parallel.simulate import simulated_rank
from parallel.stages import split_layers
from tests.parallel.parity import engine_config
from train.config_file import load_config

Shape = tuple[int, ...]
Sizes = dict[str, int]
D, LAYERS, KV, F, V = 8192, 80, 8 * 128, 28672, 128256
BLOCK: dict[str, tuple[Shape, int | None]] = {
    "attention_norm.weight": ((D,), None),
    "attention.query.weight": ((D, D), 0),
    "attention.key.weight": ((KV, D), 0),
    "attention.value.weight": ((KV, D), 0),
    "attention.output.weight": ((D, D), 1),
    "feedforward_norm.weight": ((D,), None),
    "feedforward.gate.weight": ((F, D), 0),
    "feedforward.up.weight": ((F, D), 0),
    "feedforward.down.weight": ((D, F), 1),
}
"""Llama's parameters: the whole shape, and the dimension that tensor parallelism cuts."""
OUTER: dict[str, tuple[Shape, int | None]] = {
    "embedding.weight": ((V, D), 0),
    "norm.weight": ((D,), None),
    "head.weight": ((V, D), 0),
}
PARAMETERS = 70_553_706_496

LAYOUTS: list[Sizes] = [
    {"dp_shard": 128, "tp": 8},
    {"dp_shard": 16, "tp": 8, "pp": 8},
    {"dp_replicate": 2, "dp_shard": 64, "cp": 8},
]
LARGER: list[Sizes] = [
    *LAYOUTS,
    {"dp_replicate": 2, "dp_shard": 16, "cp": 2, "tp": 8, "pp": 8},
    {"dp_replicate": 4, "dp_shard": 64, "cp": 2, "tp": 4, "pp": 8},
]


@cache
def preset() -> ModelConfig:
    config = load_config("70b", ["run.steps=1", "data.path=unused"]).config.model
    assert isinstance(config, ModelConfig)
    return config


def place_of(rank: int, sizes: Sizes) -> Sizes:
    """By counting: the last dimension turns fastest."""
    place = {}
    for name in ("tp", "cp", "dp_shard", "dp_replicate", "pp"):
        rank, place[name] = divmod(rank, sizes.get(name, 1))
    return place


def rank_at(place: Sizes, sizes: Sizes) -> int:
    """The inverse."""
    rank = 0
    for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
        rank = rank * sizes.get(name, 1) + place[name]
    return rank


def chunk(length: int, place: int, ranks: int) -> int:
    """The length of one of so many parts, as large as the first ones that all but the last have."""
    each = -(-length // ranks)
    return max(0, min(length, (place + 1) * each) - place * each)


def parameters_of(stage: int, stages: int) -> Iterator[tuple[str, Shape, int | None]]:
    """Name, whole shape and cut of what a stage has."""
    layers = split_layers(preset(), preset().max_seq_len, stages)[stage] if stages > 1 else range(LAYERS)
    for layer, (name, (shape, dim)) in product(layers, BLOCK.items()):
        yield f"blocks.{layer}.{name}", shape, dim
    for name, (shape, dim) in OUTER.items():
        if stage == (0 if name == "embedding.weight" else stages - 1):
            yield name, shape, dim


def shard_of(shape: Shape, dim: int | None, place: Sizes, sizes: Sizes) -> Shape:
    """What a rank has of a parameter: cut over tp, and the rows that are left over dp_shard x cp."""
    cut = list(shape)
    if dim is not None:
        cut[dim] = chunk(cut[dim], place["tp"], sizes.get("tp", 1))
    cp = sizes.get("cp", 1)
    cut[0] = chunk(cut[0], place["dp_shard"] * cp + place["cp"], sizes["dp_shard"] * cp)
    return tuple(cut)


def check_places(mesh: Mesh, rank: int, sizes: Sizes) -> None:
    """This rank's groups are all ranks that differ in that dimension alone."""
    place = place_of(rank, sizes)
    assert (mesh.pp_rank, mesh.cp_rank) == (place["pp"], place["cp"])
    assert mesh.data_rank == place["dp_replicate"] * sizes["dp_shard"] + place["dp_shard"]

    def along(*names: str) -> list[int]:
        places = product(*(range(sizes.get(name, 1)) for name in names))
        return [rank_at(place | dict(zip(names, at, strict=True)), sizes) for at in places]

    groups = {("tp",): mesh.tp, ("pp",): mesh.pp, ("dp_shard", "cp"): mesh.dense.get_group("fsdp")}
    if sizes.get("dp_replicate", 1) > 1:
        groups[("dp_replicate",)] = mesh.dense.get_group("dp_replicate")
    if sizes.get("cp", 1) > 1:
        groups |= {("cp",): mesh.cp, ("dp_replicate", "dp_shard"): mesh.sequences.get_group("data")}
    for names, group in groups.items():
        assert dist.get_process_group_ranks(group) == along(*names), names


def check_rank(rank: int, sizes: Sizes) -> None:
    """Places and shards of one rank."""
    ranks = prod(sizes.values())
    with simulated_rank(rank, ranks):
        parallel = ParallelConfig(**sizes)
        layout = resolve_layout(parallel, ranks)
        check_fit(layout, parallel, preset(), preset().max_seq_len)
        mesh = Mesh(layout, "cpu")
        check_places(mesh, rank, sizes)
        config = engine_config(preset(), parallel, precision="bf16", seq_len=preset().max_seq_len)
        built = build_shards(config, mesh, context_of(parallel, mesh))
        (model,) = built.models
        assert all(parameter.is_meta for parameter in model.parameters()), "nothing is allocated"
        shapes = {name: tuple(local(parameter).shape) for name, parameter in model.named_parameters()}
    place = place_of(rank, sizes)
    expected = parameters_of(place["pp"], sizes.get("pp", 1))
    assert shapes == {name: shard_of(shape, dim, place, sizes) for name, shape, dim in expected}


def test_the_preset_has_the_published_size() -> None:
    """70.6 B."""
    whole = sum(prod(shape) for _, shape, _ in parameters_of(0, 1))
    assert parameter_count(preset()).total == whole == PARAMETERS


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: str(Layout(**sizes)))
def test_a_rank_in_the_middle(sizes: Sizes) -> None:
    check_rank(517, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", LARGER, ids=lambda sizes: str(Layout(**sizes)))
@pytest.mark.parametrize("where", [0.0, 0.7, 1.0])
def test_any_rank(sizes: Sizes, where: float) -> None:
    check_rank(round(where * (prod(sizes.values()) - 1)), sizes)


@pytest.mark.parametrize("sizes", LARGER, ids=lambda sizes: str(Layout(**sizes)))
def test_all_ranks_together_have_each_weight_once_in_every_replica(sizes: Sizes) -> None:
    """By the arithmetic that ranks are held against; what tp doesn't cut, each of its ranks has."""
    stages, tp = sizes.get("pp", 1), sizes.get("tp", 1)
    kinds = [
        Counter((shape, dim) for _, shape, dim in parameters_of(stage, stages)) for stage in range(stages)
    ]
    held = uncut = 0
    for rank in range(prod(sizes.values())):
        place = place_of(rank, sizes)
        for (shape, dim), count in kinds[place["pp"]].items():
            owned = count * prod(shard_of(shape, dim, place, sizes))
            held += owned
            uncut += owned if dim is None else 0
    assert held - uncut * (tp - 1) // tp == PARAMETERS * sizes.get("dp_replicate", 1)


@pytest.mark.parametrize("stages", [2, 4, 8, 16, 80])
def test_stages_have_every_layer_once_and_equal_work(stages: int) -> None:
    layers = split_layers(preset(), preset().max_seq_len, stages)
    assert [layer for stage in layers for layer in stage] == list(range(LAYERS))
    sizes = [len(stage) for stage in layers]
    assert max(sizes) - min(sizes[:-1]) <= 1 <= min(sizes)
    assert sizes[-1] <= min(sizes[:-1]), "the head is work too"
