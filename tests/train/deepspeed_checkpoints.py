"""Checkpoints of a transformers model that DeepSpeed itself trained and saved, for tests of `trireme import`."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.zero import library
from tests.model.hugging_face import LlamaConfig, LlamaForCausalLM

LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 27,
    "head_dim": 6,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
"""Ranks can't share most of its weights evenly."""


EVEN = {"hidden_size": 24, "intermediate_size": 36}
"""Changes to LLAMA that let AutoTP cut it in two."""


@dataclass(frozen=True)
class Case:
    """How a model is trained under DeepSpeed."""

    stage: int
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to LLAMA."""
    zero: dict[str, Any] = field(default_factory=dict)
    """Settings of `zero_optimization`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings of DeepSpeed's."""
    frozen: str = " "
    """Parameters whose names hold this aren't trained."""
    ranks: int = 2

    @property
    def name(self) -> str:
        """For a folder, and for a test."""
        words = [*self.model, *self.zero, *self.settings, self.frozen.strip()]
        return "-".join(
            word for word in (f"zero{self.stage}", self.precision, f"{self.ranks}-ranks", *words) if word
        )


def train_and_save(case: Case, folder: Path) -> dict[str, Tensor] | None:
    """Runs in every worker: two steps, then what `engine.save_checkpoint` writes, and config.json beside it.

    Returns the trained fp32 weights by name, as DeepSpeed itself gathers them; on the first rank alone.
    """
    deepspeed = library.load(torch.device("cpu"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | case.model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.frozen not in name)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": case.precision == "bf16"},
        "zero_optimization": {"stage": case.stage} | case.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
    } | case.settings
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(_groups(model), lr=1e-2), config=config
    )
    for step in range(2):
        torch.manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(0, LLAMA["vocab_size"], (2, 9))
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    engine.module.universal_checkpoint_info = {"universal_checkpoint_version": 0.2}
    engine.save_checkpoint(str(folder))
    gathered = _gathered(deepspeed, engine, case)
    engine.destroy()
    if dist.get_rank() > 0:
        return None
    model.config.save_pretrained(folder)
    return gathered


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """With and without weight decay, as transformers' own trainer makes them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]


def _gathered(deepspeed: Any, engine: Any, case: Case) -> dict[str, Tensor]:
    """From the engine, not from files."""
    weights = dict(engine.module.named_parameters())
    if case.precision == "fp32" and case.stage < 3:  # every rank has them whole
        return {name: weight.detach().clone() for name, weight in weights.items()}
    gathered = {}
    for name, weight in weights.items():
        if not weight.requires_grad:
            with deepspeed.zero.GatheredParameters([weight], enabled=case.stage == 3):
                gathered[name] = weight.detach().float().clone()
        elif case.stage > 0:
            gathered[name] = deepspeed.utils.safe_get_full_fp32_param(weight).clone()
    if case.stage == 0:
        names = {weight: name for name, weight in weights.items()}
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        pairs = [pair for group in groups for pair in zip(*group, strict=True)]
        gathered |= {names[weight]: master.detach().clone() for weight, master in pairs}
    return gathered


def save_tensor_parallel(folder: Path) -> dict[str, Tensor]:
    """Runs in every worker: a model cut by DeepSpeed's AutoTP, after a step that changes nothing. Returns its weights.

    Leaves DeepSpeed with groups of its own, so the workers are to be ended after it.
    """
    deepspeed = library.load(torch.device("cpu"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | EVEN))
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 9))
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()
    engine.save_checkpoint(str(folder))
    if dist.get_rank() == 0:
        model.config.save_pretrained(folder)
    return initial


def to_universal(step: Path, out: Path) -> None:
    """By DeepSpeed's converter; runs in one worker of a pool, since DeepSpeed is loaded there."""
    library.load(torch.device("cpu"))
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(step),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
