"""Collectives made during the products beside them: where the compiler puts them, and that values are the same.

No GPU is needed: the compiler's pass is told of one, and its operators do in two steps what they do at once there.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from pydantic import ValidationError
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.virtualized import V
from torch.distributed import _symmetric_memory as shared

from parallel.apply import prepare_layers
from parallel.async_tp import check_reach
from parallel.build import Blueprint
from parallel.config import CompileConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.fit import check_async_tp
from parallel.layout import Layout
from parallel.mesh import Mesh, mesh_of
from parallel.processes import WorkerPool
from parallel.simulate import simulated_rank
from tests.parallel.parity import Run, compare, config_of, engine_config, reference, train

FUSED = {"fused_all_gather_matmul", "fused_matmul_reduce_scatter"}
ALONE = {"all_gather_into_tensor", "reduce_scatter_tensor"}


@contextmanager
def stand_in() -> Iterator[None]:
    """As if this machine had GPUs that share memory, for whatever is compiled and run in here."""
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", shared._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", shared._fused_matmul_reduce_scatter_fallback, "CPU")
    with (
        shared._test_mode(),
        patch.object(dist, "is_nccl_available", return_value=True),
        patch("parallel.async_tp.check_reach"),
        inductor.patch(_micro_pipeline_tp=False),
    ):
        yield


def operators(graph: fx.Graph) -> Counter[str]:
    """Collectives of a graph, fused and alone."""
    names = (getattr(node.target, "_opname", "") for node in graph.nodes)
    return Counter(name for name in names if name in FUSED | ALONE)


def block_graphs(model: dict[str, Any], **parallel: Any) -> list[Counter[str]]:
    """Collectives of a block's forward and backward, as one of two tensor-parallel ranks compiles it."""
    found = []

    def compiler(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        view_to_reshape(module)
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(module, is_inference=False)
        found.append(operators(module.graph))
        return make_boxed_func(module.forward)

    with simulated_rank(0, 2), stand_in():
        config = engine_config(
            config_of({"num_layers": 1} | model),
            ParallelConfig(tp=2, **parallel),
            compile=CompileConfig(enabled=True),
        )
        mesh = Mesh(Layout(tp=2), "cpu")
        built = Blueprint(config.model, config.parallel, mesh, None).build(0, torch.float32).model
        built.to_empty(device="cpu")
        prepare_layers(built, config, None, mesh)
        for layer in built.layers:
            layer.compile(backend=aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table()))
        tokens = torch.zeros(2, 12, dtype=torch.int64)
        built.loss_sum(tokens=tokens, targets=tokens).backward()
    return [graph for graph in found if graph.total() > 1]  # the others share tokens out, and join them


GATHERS, SCATTERS = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"

MODELS: list[tuple[dict[str, Any], int]] = [
    ({}, 2),
    ({"attention": {"qk_norm": True, "num_kv_heads": 1}, "ffn": {"variant": "mlp"}}, 1),
]
"""And the backward's scatters that stay alone: of sums, of what queries, keys and values give, or gate and up."""


@pytest.mark.parametrize(("model", "left"), MODELS)
def test_collectives_are_fused_with_products(model: dict[str, Any], left: int) -> None:
    forward, backward = block_graphs(model, async_tp=True)
    assert forward == {GATHERS: 2, SCATTERS: 2}
    assert backward == Counter({GATHERS: 2, SCATTERS: 2 - left, "reduce_scatter_tensor": left})


def test_without_the_setting_they_are_not() -> None:
    alone = {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    assert block_graphs({}) == [alone, alone]


def train_fused(micro: int, parallel: dict[str, Any], model: dict[str, Any]) -> tuple[Run, Counter[str]]:
    """Runs in every worker: as `train`, and the collectives of all graphs that were compiled for it."""
    found: Counter[str] = Counter()
    with stand_in(), inductor.patch(post_grad_custom_post_pass=lambda graph: found.update(operators(graph))):
        run = train({"tp": 2}, micro, "fp64", {"compile": True, "async_tp": True} | parallel, model)
    return run, found


@pytest.mark.slow
@pytest.mark.parametrize("again", ["none", "selective"])
def test_values_are_those_of_one_process(pools: dict[int, WorkerPool], again: str) -> None:
    settings = {"activation_checkpoint": {"mode": again}}
    results = pools[2].run(train_fused, 4, settings, {})
    compare([run for run, _ in results], reference({}))
    for _, found in results:
        assert found[GATHERS] and found[SCATTERS], found


REFUSED: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    ({}, {}, 12, "compile.enabled=false: use compile.enabled=true"),
    ({"compile": True, "engine": "deepspeed"}, {}, 12, "use that"),
    ({"compile": True, "precision": "fp8"}, {}, 12, "use precision=bf16"),
    (
        {"compile": True},
        {},
        15,
        "doesn't divide sequences of 15 tokens, which are padded then: use parallel.tp=1",
    ),
    ({"compile": True}, {"attention": {"bias": True}}, 12, "use model.attention.bias=false"),
    ({"compile": True}, {"ffn": {"bias": True}}, 12, "use model.ffn.bias=false"),
]


@pytest.mark.parametrize(("settings", "model", "seq_len", "message"), REFUSED)
def test_what_the_compiler_would_not_see_is_refused(
    settings: dict[str, Any], model: dict[str, Any], seq_len: int, message: str
) -> None:
    parallel = ParallelConfig(tp=2, async_tp=True, engine=settings.get("engine", "torch"))
    compilation, precision = CompileConfig(enabled="compile" in settings), settings.get("precision", "bf16")
    arguments = Layout(tp=2), parallel, compilation, precision, config_of(model), seq_len
    with pytest.raises(LayoutError, match=f"^parallel.async_tp=true: .*{message}.*$"):
        check_async_tp(*arguments)
    check_async_tp(arguments[0], ParallelConfig(tp=2), *arguments[2:])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({}, "parallel.tp=1 has no"), ({"tp": 2, "sequence_parallel": False}, "sequence_parallel=true")],
)
def test_without_tokens_that_are_cut_it_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(async_tp=True, **sizes)


def refusal(device: str, hosts: list[str], peers: bool) -> str:
    """Runs in every worker: what is said of its group, on such GPUs."""
    mesh = mesh_of(Layout(tp=2), "cpu")
    rank = dist.get_rank()
    with (
        patch.object(mesh, "device_type", device),
        patch("socket.gethostname", return_value=hosts[rank]),
        patch("torch.cuda.current_device", return_value=rank),
        patch("torch.cuda.can_device_access_peer", return_value=peers),
    ):
        try:
            check_reach(mesh)
        except LayoutError as error:
            return str(error)
    return ""


def test_ranks_without_shared_memory_are_told_alike(pools: dict[int, WorkerPool]) -> None:
    for device, hosts, peers, message in (
        ("cuda", ["a", "a"], True, ""),
        ("cuda", ["a", "a"], False, "GPU 0 of a doesn't reach the memory of GPU 1"),
        ("cuda", ["a", "b"], True, "ranks are on a and b"),
        ("cpu", ["a", "a"], True, "the device is a cpu"),
    ):
        first, second = pools[2].run(refusal, device, hosts, peers)
        assert first == second and message in first and bool(first) == bool(message)
