"""A run at any layout, in worker processes, and the same run in plain torch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.stream import Batch
from model.build import build_model
from model.config import BaseModelConfig, ModelConfig
from model.flow_matching.model import FlowMatching
from model.initialize import initialize
from model.loss import IGNORE_INDEX
from model.models import parse_model
from model.moe import take_expert_counts, update_balance
from parallel import engines
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from parallel.engine import Engine, EngineConfig
from parallel.fsdp import master_dtype
from parallel.gradients import gathered
from parallel.layout import Layout
from parallel.processes import WorkerPool

MODEL = {
    "vocab_size": 67,
    "d_model": 24,
    "num_layers": 2,
    "max_seq_len": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "ffn": {"d_ff": 40},
}
GLOBAL_BATCH, SEQ_LEN, SOURCE_LEN, STEPS, LR, CLIP = 8, 12, 9, 20, 1e-2, 0.5

Run = tuple[dict[str, str], list[float], list[float]]
"""Digests of the initial weights, losses and gradient norms."""

Case = tuple[dict[str, int], int, dict[str, Any], dict[str, Any]]
"""Layout, sequences in a micro-batch (of 8 in all data ranks' batches), `parallel` and other sections, `model`."""

Record = Callable[[str, object], None]
"""Notes something by its name in the test's report: pytest's `record_property`."""


def global_batch(step: int, names: tuple[str, ...] = ("tokens",)) -> Batch:
    """Counting from random starts; uneven numbers of targets are scored, so that a mean of means would show.

    names: of what the model takes beside the targets.
    """
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, MODEL["vocab_size"], (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQ_LEN + 1)) % MODEL["vocab_size"]
    targets = tokens[:, 1:].clone()
    for sequence in range(GLOBAL_BATCH):
        targets[sequence, SEQ_LEN - sequence :] = -100
    columns = {
        "tokens": tokens[:, :-1],
        "classes": start[:, 0] % 3,
        "seeds": torch.randint(2**62, (GLOBAL_BATCH,), generator=generator),
        "source": tokens[:, :SOURCE_LEN].flip(1),
        "source_padding": torch.arange(SOURCE_LEN)
        >= SOURCE_LEN - torch.arange(GLOBAL_BATCH).unsqueeze(1) // 2,
    }
    return Batch({name: columns[name] for name in names}, targets, torch.arange(GLOBAL_BATCH))


def optimizer(model: torch.nn.Module, _: BaseModelConfig) -> torch.optim.Optimizer:
    """As a run makes it, small."""
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, fused=True)


def config_of(model: dict[str, Any]) -> ModelConfig:
    """The small model with changes."""
    return parse_model(merged(MODEL, model))


def engine_config(model: BaseModelConfig, parallel: ParallelConfig, **others: Any) -> EngineConfig:
    """What is not given is as small and plain as it can be."""
    plain: dict[str, Any] = {
        "precision": "fp32",
        "activation_checkpoint": ActivationCheckpointConfig(),
        "compile": CompileConfig(),
        "micro_batch_size": 1,
        "global_batch_size": GLOBAL_BATCH,
        "seq_len": SEQ_LEN,
        "max_grad_norm": CLIP,
        "seed": 3,
    }
    return EngineConfig(model, parallel, **plain | others)


def make_engine(
    layout: dict[str, int], micro: int, precision: str, parallel: dict[str, Any], model: dict[str, Any]
) -> Engine:
    """An engine in a worker process."""
    settings = dict(parallel)
    checkpointing = settings.pop("activation_checkpoint", {"mode": "none"})
    compiled = settings.pop("compile", False)
    torch.compiler.reset()  # code compiled for other engines counts towards the limit of kinds
    config = engine_config(
        config_of(model),
        ParallelConfig(**layout, **settings),
        precision=precision,
        activation_checkpoint=ActivationCheckpointConfig(**checkpointing),
        compile=CompileConfig(enabled=compiled),
        micro_batch_size=micro,
    )
    return engines.make_engine(config, Layout(**layout), torch.device("cpu"), optimizer)


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, section by section."""
    result = dict(settings)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def share_of(engine: Engine, step: int, names: tuple[str, ...] = ("tokens",)) -> Batch:
    """This rank's share of a global batch."""
    shares = list(global_batch(step, names).micro_batches(GLOBAL_BATCH // engine.layout.data_size))
    return shares[engine.mesh.data_rank]


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """A hash of all bits of each."""
    return {
        name: hashlib.sha256(gathered(tensor).contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def train(
    layout: dict[str, int], micro: int, precision: str, parallel: dict[str, Any], model: dict[str, Any]
) -> Run:
    """Runs in every worker: digests of the initial weights, losses and gradient norms."""
    engine = make_engine(layout, micro, precision, parallel, model)
    initial = digests(engine.weights())
    names = config_of(model).inputs
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(engine.forward_backward(share_of(engine, step, names), step).item())
        norms.append(engine.step(LR).item())
    return initial, losses, norms


def reference(model_settings: dict[str, Any], precision: str = "fp64") -> Run:
    """The same run in plain torch: no sharding, no micro-batches, the loss from whole logits.

    The experts' auxiliary losses have no value there, but a gradient.
    """
    return _reference(json.dumps(model_settings), precision)


@cache
def _reference(model_settings: str, precision: str) -> Run:
    config = config_of(json.loads(model_settings))
    model = build_model(config).to(master_dtype(precision))  # type: ignore[arg-type]
    initialize(model, config, seed=3)
    initial = digests({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    adam = optimizer(model, config)
    losses, norms = [], []
    for step in range(STEPS):
        loss = mean_loss(model, global_batch(step, config.inputs))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(loss.item())
        adam.step()
        adam.zero_grad()
        counts = take_expert_counts(model)
        if counts is not None:
            update_balance(model, counts)
    return initial, losses, norms


def mean_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """By the model's forward, on the whole batch at once; flow matching's on distributions."""
    inputs = dict(batch.inputs)
    if isinstance(model, FlowMatching):
        t, noise = model.draw(inputs.pop("seeds"), SEQ_LEN)
        data = batch.targets.where(batch.targets != IGNORE_INDEX, noise)
        start, end = (F.one_hot(tokens, MODEL["vocab_size"]).to(t.dtype) for tokens in (noise, data))
        weight = t[:, None, None]
        inputs |= {"t": t, "xt": (1 - weight) * start + weight * end}
    _, loss = model(**inputs, targets=batch.targets)
    return loss


def compare(results: list[Run], expected: Run, bound: float = 1e-9) -> tuple[float, float]:
    """What `train` returned on all ranks against what `reference` did: within a relative bound.

    Returns the largest relative differences of a loss and of a gradient norm.
    """
    initial, losses, norms = expected
    assert losses[-1] < losses[0], "something is learned"
    everywhere: dict[str, str] = {}
    for rank_initial, rank_losses, rank_norms in results:
        assert rank_initial.items() <= initial.items()
        everywhere |= rank_initial
        assert rank_losses == pytest.approx(losses, rel=bound)
        assert rank_norms == pytest.approx(norms, rel=bound)
    assert everywhere == initial
    return (
        max(apart(rank_losses, losses) for _, rank_losses, _ in results),
        max(apart(rank_norms, norms) for *_, rank_norms in results),
    )


def apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(found, expected, strict=True))


def check(pools: dict[int, WorkerPool], case: Case, precision: str, bound: float, record: Record) -> None:
    """Against one process; what `tests.parallel.proved` makes its table of is noted."""
    layout, micro, parallel, model = case
    for name, value in told(case).items():
        record(name, value)
    record("precision", precision)
    results = pools[ranks_of(case)].run(train, layout, micro, precision, parallel, model)
    loss, grad_norm = compare(results, reference(model, precision), bound)
    record("loss", loss)
    record("grad_norm", grad_norm)


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """The engine deepspeed, with its section."""
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **settings}}


def ranks_of(case: Case) -> int:
    """Processes that it takes."""
    return prod(size for name, size in case[0].items() if name != "ep")


TOLD_ANYWAY = {"tp": "sequence_parallel", "pp": "pp_schedule"}
"""By dimension, the setting that is told of a case though it is the default's."""


def told(case: Case) -> dict[str, str]:
    """What a report says of a case: sizes of its layout, and all settings but sizes."""
    layout, micro, parallel, model = case
    sizes = [f"{field.name}={layout[field.name]}" for field in fields(Layout) if field.name in layout]
    defaults = {
        TOLD_ANYWAY[name]: getattr(ParallelConfig(), TOLD_ANYWAY[name])
        for name in layout
        if name in TOLD_ANYWAY
    }
    return {
        "layout": " ".join(sizes),
        "settings": " ".join([f"micro_batch_size={micro}", *settings_of(defaults | parallel)]),
        "model": " ".join(settings_of(model)),
    }


def name_of(case: Case) -> str:
    """All that is told of a case."""
    return " ".join(part for part in told(case).values() if part)


def settings_of(section: dict[str, Any]) -> list[str]:
    """`key.path=value` of choices; a section that has none is named."""
    found = []
    for name, value in section.items():
        if isinstance(value, dict):
            found += [f"{name}.{inner}" for inner in settings_of(value)] or [name]
        elif isinstance(value, bool | str) or name == "stage":
            found.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return found
