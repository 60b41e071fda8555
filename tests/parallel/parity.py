"""A run at any layout, in worker processes, and the same run in plain torch."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from model.build import build_model
from model.config import ModelConfig
from model.initialize import initialize
from model.moe import take_expert_counts, update_balance
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from parallel.engine import TorchEngine
from parallel.layout import Layout
from parallel.mesh import mesh_of

MODEL = {
    "vocab_size": 67,
    "d_model": 24,
    "num_layers": 2,
    "max_seq_len": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "ffn": {"d_ff": 40},
}
GLOBAL_BATCH, SEQ_LEN, STEPS, LR, CLIP = 8, 12, 20, 1e-2, 0.5


@dataclass
class TokenBatch:
    """What the engine needs of a batch."""

    tokens: torch.Tensor
    targets: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes."""
        return {"tokens": self.tokens}

    def micro_batches(self, size: int) -> Any:
        """Cuts of `size` sequences."""
        for start in range(0, len(self.tokens), size):
            yield TokenBatch(self.tokens[start : start + size], self.targets[start : start + size])

    def to(self, device: torch.device) -> "TokenBatch":
        """A copy on `device`."""
        return TokenBatch(self.tokens.to(device), self.targets.to(device))


def global_batch(step: int) -> TokenBatch:
    """Counting from random starts; uneven numbers of targets are scored, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, MODEL["vocab_size"], (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQ_LEN + 1)) % MODEL["vocab_size"]
    targets = tokens[:, 1:].clone()
    for sequence in range(GLOBAL_BATCH):
        targets[sequence, SEQ_LEN - sequence :] = -100
    return TokenBatch(tokens[:, :-1], targets)


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As a run makes it, small."""
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, fused=True)


def make_engine(
    layout: dict[str, int], micro: int, precision: str, parallel: dict[str, Any], model: dict[str, Any]
) -> TorchEngine:
    """An engine in a worker process."""
    settings = dict(parallel)
    checkpointing = settings.pop("activation_checkpoint", {"mode": "none"})
    compiled = settings.pop("compile", False)
    return TorchEngine(
        ModelConfig.model_validate(merged(MODEL, model)),
        ParallelConfig(**layout, **settings),
        precision,  # type: ignore[arg-type]
        ActivationCheckpointConfig(**checkpointing),
        CompileConfig(enabled=compiled),
        mesh=mesh_of(Layout(**layout), "cpu"),
        device=torch.device("cpu"),
        make_optimizer=optimizer,
        micro_batch_size=micro,
        seq_len=SEQ_LEN,
        max_grad_norm=CLIP,
        seed=3,
    )


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, section by section."""
    result = dict(settings)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def share_of(engine: TorchEngine, step: int) -> TokenBatch:
    """This rank's share of a global batch."""
    batch, share = global_batch(step), GLOBAL_BATCH // engine.layout.data_size
    mine = slice(engine.mesh.data_rank * share, (engine.mesh.data_rank + 1) * share)
    return TokenBatch(batch.tokens[mine], batch.targets[mine])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """A hash of all bits of each."""
    return {
        name: hashlib.sha256(whole(tensor).contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def train(
    layout: dict[str, int], micro: int, precision: str, parallel: dict[str, Any], model: dict[str, Any]
) -> Any:
    """Runs in every worker: digests of the initial weights, losses and gradient norms."""
    engine = make_engine(layout, micro, precision, parallel, model)
    initial = digests(engine.weights())
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(engine.forward_backward(share_of(engine, step), step).item())
        norms.append(engine.step(LR).item())
    return initial, losses, norms


def reference(model_settings: dict[str, Any]) -> tuple[dict[str, str], list[float], list[float]]:
    """The same run in plain torch: no sharding, no micro-batches, the loss from whole logits.

    The experts' auxiliary losses have no value there, but a gradient.
    """
    config = ModelConfig.model_validate(merged(MODEL, model_settings))
    model = build_model(config).double()
    initialize(model, config, seed=3)
    initial = digests({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    adam = optimizer(model)
    losses, norms = [], []
    for step in range(STEPS):
        batch = global_batch(step)
        _, loss = model(batch.tokens, batch.targets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(loss.item())
        adam.step()
        adam.zero_grad()
        counts = take_expert_counts(model)
        if counts is not None:
            update_balance(model, counts)
    return initial, losses, norms


def compare(results: list[Any], expected: tuple[dict[str, str], list[float], list[float]]) -> None:
    """What `train` returned on all ranks against what `reference` did."""
    initial, losses, norms = expected
    everywhere: dict[str, str] = {}
    for rank_initial, rank_losses, rank_norms in results:
        assert rank_initial.items() <= initial.items()
        everywhere |= rank_initial
        assert rank_losses == pytest.approx(losses, rel=1e-9)
        assert rank_norms == pytest.approx(norms, rel=1e-9)
    assert everywhere == initial
