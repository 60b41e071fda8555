"""The `parallel.deepspeed` section, and the configuration that DeepSpeed itself is given. Light to import."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from parallel.errors import LayoutError

Device = Literal["none", "cpu", "nvme"]


class DeepSpeedConfig(BaseModel):
    """What parallel.engine=deepspeed does; another engine doesn't read it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    stage: Literal[0, 1, 2, 3] = 2
    """What is partitioned over the data-parallel ranks: 0 nothing, 1 the optimizer's state, 2 gradients too, 3
    weights too."""
    offload_optimizer: Device = "none"
    """Where the optimizer's state is kept, and its step computed; `nvme` with stage 3."""
    offload_param: Device = "none"
    """Where partitioned weights wait for their use, with stage 3."""
    nvme_path: str | None = None
    """A folder on a fast local disk, for what is offloaded to `nvme`."""
    config: dict[str, Any] = {}
    """DeepSpeed's own keys, as in its JSON file, merged into what Trireme gives it."""

    @model_validator(mode="after")
    def _check(self) -> "DeepSpeedConfig":
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(
                f"parallel.deepspeed.offload_param={self.offload_param} is for weights that are partitioned: use "
                f"parallel.deepspeed.stage=3, or leave it out"
            )
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError(
                f"parallel.deepspeed.offload_optimizer={self.offload_optimizer} needs parallel.deepspeed.stage=1, 2 "
                f"or 3"
            )
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError(
                "parallel.deepspeed.offload_optimizer=nvme needs parallel.deepspeed.stage=3: use it, or "
                "parallel.deepspeed.offload_optimizer=cpu"
            )
        if ("nvme" in (self.offload_optimizer, self.offload_param)) != (self.nvme_path is not None):
            raise ValueError(
                "parallel.deepspeed.nvme_path is the folder of what is offloaded to nvme: give both or neither"
            )
        return self


def library_config(
    section: DeepSpeedConfig,
    precision: str,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """DeepSpeed's configuration: what the run's own keys say, defaults of ours, and the user's raw keys.

    Raises:
        LayoutError: a raw key contradicts the run's own, or is for the run to say.
    """
    said: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("data.micro_batch_size", micro_batch_size),
        "gradient_accumulation_steps": (
            "data.global_batch_size / data.micro_batch_size / data-parallel ranks",
            accumulation_steps,
        ),
        "gradient_clipping": ("optimizer.max_grad_norm", max_grad_norm),
        "zero_optimization.stage": ("parallel.deepspeed.stage", section.stage),
        "bf16.enabled": ("precision", precision == "bf16"),
        "fp16.enabled": ("precision", precision == "fp16"),
        "zero_optimization.offload_optimizer.device": (
            "parallel.deepspeed.offload_optimizer",
            section.offload_optimizer,
        ),
        "zero_optimization.offload_param.device": ("parallel.deepspeed.offload_param", section.offload_param),
    }
    given = _flat(section.config)
    for key in given:
        _refuse_foreign(key)
    if given.get("zero_optimization.round_robin_gradients"):
        raise LayoutError(
            "parallel.deepspeed.config has zero_optimization.round_robin_gradients=True, under which DeepSpeed 0.19 "
            "takes weights for each other when they are saved: leave it out"
        )
    for key, (ours, value) in said.items():
        if given.get(key, value) not in (value, "auto"):
            raise LayoutError(
                f"parallel.deepspeed.config has {key}={given[key]!r}, but {ours} says {value!r}: leave one of them out"
            )
    flat = {**_defaults(section, precision), **given, **{key: value for key, (_, value) in said.items()}}
    for what in ("offload_optimizer", "offload_param"):
        if flat[f"zero_optimization.{what}.device"] == "none":
            flat = {key: value for key, value in flat.items() if f".{what}." not in key}
    return _nested(flat)


def _defaults(section: DeepSpeedConfig, precision: str) -> dict[str, Any]:
    """What raw keys may say otherwise. Sums of gradients are in fp32, as in the torch engine."""
    flat: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if precision != "fp32":
        flat["communication_data_type"] = "fp32"
        if section.stage > 0:
            flat["data_types.grad_accum_dtype"] = "fp32"
    if precision == "bf16":
        flat["bf16.check_grad_overflow"] = True
    if precision == "fp16":
        flat |= {"fp16.initial_scale_power": 16, "fp16.loss_scale_window": 2000, "fp16.hysteresis": 1}
    for what, device in (
        ("offload_optimizer", section.offload_optimizer),
        ("offload_param", section.offload_param),
    ):
        if device == "nvme":
            flat[f"zero_optimization.{what}.nvme_path"] = section.nvme_path
    return flat


_OWNED_ELSEWHERE = {
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "expert_parallel": "parallel.ep",
    "pipeline": "parallel.pp",
    "train_batch_size": "data.global_batch_size",
    "zero_optimization.mics_shard_size": "parallel.dp_shard, with parallel.engine=torch,",
}


def _refuse_foreign(key: str) -> None:
    for owned, instead in _OWNED_ELSEWHERE.items():
        if key == owned or key.startswith(f"{owned}."):
            raise LayoutError(f"parallel.deepspeed.config has {key}, which {instead} says: leave it out")


def raw_number(section: DeepSpeedConfig, key: str, default: int) -> int:
    """What one of DeepSpeed's own keys is, such as `zero_optimization.reduce_bucket_size`, or its default."""
    return int(_flat(section.config).get(key, default))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return tree
