"""Ring attention: blocks put together are attention, with every mask, bias and dropout, and work is even."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel.ring
from model.attention_config import AttentionConfig
from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from model.kernels import Mask, attend
from model.masks import bias_by_distance, dense, dense_bias
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from parallel.engine import EngineConfig
from parallel.engines import make_engine
from parallel.layout import Layout
from parallel.processes import WorkerPool
from parallel.ring_blocks import Attended, Block, Merged, Scoring, attend_block, block_gradients, blocks
from parallel.zigzag import fold, runs_of, unfold
from tests.parallel.parity import Batch, merged, optimizer

LENGTH, RANKS = 24, 3
MASKS: list[dict[str, Any]] = [
    {},
    {"mask_type": "bidirectional"},
    {"mask_type": "sliding_window", "window_size": 3},
    {"mask_type": "sliding_window", "window_size": 7},
    {"mask_type": "local", "window_size": 3},
    {"mask_type": "block_sparse", "block_size": 5},
    {"mask_type": "block_sparse", "block_size": 5, "pattern": "fixed", "summary_size": 2},
]
ROWS = torch.arange(2).unsqueeze(1)
DOCUMENTS = (torch.arange(LENGTH) + 3 * ROWS) // 7
PADDING = torch.arange(LENGTH) < 4 * ROWS


def penalty(head: Tensor, distance: Tensor) -> Tensor:
    return (head + 1) * (distance * 0.7).sin()


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "documents": {"documents": DOCUMENTS},
    "padding": {"padding": PADDING},
    "all": {"bias": True, "documents": DOCUMENTS, "padding": PADDING},
}


def inputs_of(width: int = 6, value_width: int = 6) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, width), (2, width), (2, value_width), (4, value_width))
    return [
        torch.randn(2, heads, LENGTH, wide, generator=generator, dtype=torch.float64) for heads, wide in sizes
    ]


def of_runs(x: Tensor, rank: int) -> Tensor:
    """(B, H, T, E) -> what a rank has."""
    return torch.cat([x[:, :, run.start : run.stop] for run in runs_of(LENGTH, rank, RANKS)], dim=2)


def pairs(config: AttentionConfig, rank: int) -> Iterator[tuple[int, Block]]:
    for other in range(RANKS):
        for block in blocks(config, runs_of(LENGTH, rank, RANKS), runs_of(LENGTH, other, RANKS)):
            yield other, block


def in_blocks(inputs: list[Tensor], scoring: Scoring) -> list[Tensor]:
    """What all ranks compute, one after another: output, and gradients of query, key, value and bias."""
    query, key, value, grad = inputs
    out, of_query, of_key, of_value = (torch.zeros_like(part) for part in (grad, query, key, value))
    of_bias = torch.zeros(0) if scoring.bias is None else torch.zeros_like(scoring.bias)
    for rank in range(RANKS):
        mine, total = of_runs(query, rank), Merged(of_runs(query, rank), value.shape[-1])
        found = [
            (block, of_runs(key, other), of_runs(value, other))
            for other, block in pairs(scoring.config, rank)
        ]
        for block, keys, values in found:
            theirs = keys[:, :, block.of_keys], values[:, :, block.of_keys]
            total.add(block.of_queries, *attend_block(mine[:, :, block.of_queries], *theirs, block, scoring))
        attended = Attended(total.out, total.log_sums, of_runs(grad, rank))
        for block, keys, values in found:
            at, to = slice(block.queries.start, block.queries.stop), slice(block.keys.start, block.keys.stop)
            theirs = keys[:, :, block.of_keys], values[:, :, block.of_keys]
            here = attended.of(block.of_queries)
            made = block_gradients(mine[:, :, block.of_queries], *theirs, here, block, scoring)
            of_query[:, :, at] += made.query
            of_key[:, :, to] += made.key
            of_value[:, :, to] += made.value
            if made.bias is not None:
                of_bias[:, scoring.distances(block)] += made.bias
            out[:, :, at] = here.out
    return [out, of_query, of_key, of_value, of_bias]


def at_once(inputs: list[Tensor], scoring: Scoring, kept: Tensor | None = None) -> list[Tensor]:
    """The same by the naive kernel, or the formula with dropout, and autograd."""
    query, key, value = (part.clone().requires_grad_() for part in inputs[:3])
    whole = range(LENGTH)
    seen = dense(scoring.config, whole, whole, query, scoring.documents, scoring.padding)
    bias = None if scoring.bias is None else scoring.bias.clone().requires_grad_()
    tensor = seen if bias is None else dense_bias(bias, LENGTH).masked_fill(~seen, -torch.inf)
    if kept is None:
        cap = scoring.config.logit_soft_cap
        out = attend(query, key, value, Mask("naive", tensor=tensor), dropout=0.0, soft_cap=cap)
    else:
        scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / query.shape[-1] ** 0.5
        out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) * kept) @ value.repeat_interleave(2, 1)
    parts = [query, key, value] if bias is None else [query, key, value, bias]
    gradients = torch.autograd.grad(out, parts, inputs[3])
    return [out.detach(), *gradients, *([torch.zeros(0)] if bias is None else [])]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_blocks_put_together_are_attention(mask: dict[str, Any], extras: str) -> None:
    """Of a row whose first places are padding, queries there see nothing, and get zeros."""
    config = AttentionConfig(num_heads=4, num_kv_heads=2, **mask)
    told = dict(EXTRAS[extras])
    inputs, whole = inputs_of(), range(LENGTH)
    if told.pop("bias", False):
        told["bias"] = bias_by_distance(penalty, range(4), whole, whole, inputs[0])
    scoring = Scoring(config, LENGTH, **told)
    check(in_blocks(inputs, scoring), at_once(inputs, scoring))


@pytest.mark.parametrize(
    "settings", [{"logit_soft_cap": 0.5}, {"kernel": "naive"}, {"kernel": "flash"}], ids=str
)
@pytest.mark.parametrize("widths", [(6, 6), (8, 4)])
def test_caps_kernels_and_widths(settings: dict[str, Any], widths: tuple[int, int]) -> None:
    scoring = Scoring(AttentionConfig(num_heads=4, num_kv_heads=2, **settings), LENGTH)
    inputs = inputs_of(*widths)
    check(in_blocks(inputs, scoring), at_once(inputs, scoring))


def test_dropout_draws_the_same_in_the_backward() -> None:
    """And other numbers in each block."""
    config = AttentionConfig(num_heads=4, num_kv_heads=2, dropout=0.3)
    scoring = Scoring(config, LENGTH, dropout=0.3, seed=torch.tensor(5))
    kept = torch.zeros(2, 4, LENGTH, LENGTH, dtype=torch.float64)
    for rank in range(RANKS):
        for _, block in pairs(config, rank):
            queries, keys = (slice(run.start, run.stop) for run in (block.queries, block.keys))
            drawn = scoring.kept(block, kept[:, :, queries, keys])
            assert drawn is not None
            kept[:, :, queries, keys] = drawn
    inputs = inputs_of()
    check(in_blocks(inputs, scoring), at_once(inputs, scoring, kept))
    drawn_from = kept[:, :, :4, :4], kept[:, :, 4:8, :4]
    assert not torch.equal(*drawn_from)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2))
def test_all_places_are_shared_out(ranks: int, each: int, more: int) -> None:
    x = torch.arange(2 * 2 * ranks * each * (more + 1)).view(2, 2 * ranks * each, -1)
    held = [place for rank in range(ranks) for run in runs_of(x.shape[1], rank, ranks) for place in run]
    assert sorted(held) == list(range(x.shape[1]))
    assert torch.equal(fold(x, ranks), x[:, held])
    assert torch.equal(unfold(fold(x, ranks), ranks), x)


def scores_of(block: Block) -> int:
    """That are computed."""
    queries = len(block.queries)
    return queries * (queries + 1) // 2 if block.sight == "causal" else queries * len(block.keys)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_causal_work_is_even_and_none_is_wasted(ranks: int) -> None:
    length = 4 * ranks
    runs = [runs_of(length, rank, ranks) for rank in range(ranks)]
    config = AttentionConfig()
    work = [
        sum(scores_of(block) for theirs in runs for block in blocks(config, mine, theirs)) for mine in runs
    ]
    assert work == [length * (length + 1) // 2 // ranks] * ranks


@given(st.sampled_from(MASKS), st.data())
def test_what_is_said_of_a_block_is_so(mask: dict[str, Any], data: st.DataObject) -> None:
    config = AttentionConfig(**mask)
    runs = [run for rank in range(RANKS) for run in runs_of(LENGTH, rank, RANKS)]
    queries, keys = data.draw(st.sampled_from(runs)), data.draw(st.sampled_from(runs))
    seen = dense(config, queries, keys, torch.zeros(1), None, None)
    found = list(blocks(config, (queries,), (keys,)))
    assert bool(found) or not seen.any()
    for block in found:
        if block.sight == "all":
            assert seen.all()
        elif block.sight == "causal":
            assert torch.equal(seen, torch.ones_like(seen).tril())


SEQ_LEN, STEPS = 16, 3
SMALL = {
    "vocab_size": 67,
    "d_model": 24,
    "num_layers": 2,
    "max_seq_len": SEQ_LEN,
    "attention": {"num_heads": 2, "num_kv_heads": 1},
    "ffn": {"d_ff": 40},
}


def batch_of(step: int) -> Batch:
    """Several documents in a row, and padding at the end of some."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 67, (4, SEQ_LEN + 1), generator=generator)
    ends = torch.rand(4, SEQ_LEN, generator=generator) < 0.2
    padding = torch.arange(SEQ_LEN) >= SEQ_LEN - torch.arange(4).unsqueeze(1)
    targets = tokens[:, 1:].masked_fill(padding, -100)
    inputs = {"tokens": tokens[:, :-1], "document_ids": ends.cumsum(1), "padding": padding}
    return Batch(inputs, targets, torch.arange(4))


def train(changes: dict[str, Any], layout: dict[str, int], mode: str) -> tuple[list[float], list[float], int]:
    """Runs in every worker: losses, gradient norms, and the scores that a rank computed in its forwards."""
    counted = 0
    plain: Callable[..., Any] = parallel.ring.attend_block

    def counting(query: Tensor, key: Tensor, value: Tensor, block: Block, scoring: Scoring) -> Any:
        nonlocal counted
        counted += query.shape[0] * scores_of(block)
        return plain(query, key, value, block, scoring)

    config = EngineConfig(
        ModelConfig.model_validate(merged(SMALL, changes)),
        ParallelConfig(**layout, cp_method="ring"),
        "fp64",
        ActivationCheckpointConfig(mode=mode),  # type: ignore[arg-type]
        CompileConfig(),
        micro_batch_size=2,
        global_batch_size=4,
        seq_len=SEQ_LEN,
        max_grad_norm=0.5,
        seed=3,
    )
    engine = make_engine(config, Layout(**layout), torch.device("cpu"), optimizer)
    losses, norms = [], []
    parallel.ring.attend_block = counting
    try:
        for step in range(STEPS):
            losses.append(engine.forward_backward(batch_of(step), step).item())
            norms.append(engine.step(1e-2).item())
    finally:
        parallel.ring.attend_block = plain
    return losses, norms, counted


def reference(changes: dict[str, Any]) -> tuple[list[float], list[float]]:
    config = ModelConfig.model_validate(merged(SMALL, changes))
    model = build_model(config).double()
    initialize(model, config, seed=3)
    adam, losses, norms = optimizer(model, config), [], []
    for step in range(STEPS):
        batch = batch_of(step)
        _, loss = model(**batch.inputs, targets=batch.targets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        losses.append(loss.item())
        adam.step()
        adam.zero_grad()
    return losses, norms


@pytest.mark.parametrize(
    ("positional", "mode"),
    [("rope", "none"), ("learned", "full"), ("relative", "selective"), ("sinusoidal", "none")],
)
def test_documents_and_padding_on_more_ranks_than_heads(
    pools: dict[int, WorkerPool], positional: str, mode: str
) -> None:
    changes = {"positional": {"encoding": positional}}
    losses, norms = reference(changes)
    results = pools[4].run(train, changes, {"cp": 4}, mode)
    for found_losses, found_norms, _ in results:
        assert found_losses == pytest.approx(losses, rel=1e-9)
        assert found_norms == pytest.approx(norms, rel=1e-9)
    forwards = 2 if mode == "full" else 1  # selective recomputation keeps what attention made
    scores = SEQ_LEN * (SEQ_LEN + 1) // 2 // 4
    assert {counted for *_, counted in results} == {STEPS * forwards * 4 * 2 * scores}


def test_dropout_is_recomputed_as_it_was(pools: dict[int, WorkerPool]) -> None:
    """Each rank draws its own numbers, and again the same ones."""
    changes = {"attention": {"dropout": 0.5}}
    plain, *others = (pools[2].run(train, changes, {"cp": 2}, mode) for mode in ("none", "full", "selective"))
    for recomputed in others:
        for (losses, norms, _), (expected_losses, expected_norms, _) in zip(recomputed, plain, strict=True):
            assert losses == expected_losses
            assert norms == pytest.approx(expected_norms, rel=1e-12)
    without, *_ = pools[2].run(train, {}, {"cp": 2}, "none")
    assert without[0] != plain[0][0]
