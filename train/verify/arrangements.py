"""What is tried: layouts, written as `tp=2,dp_shard=2`, with what else may not change a run. Light to import."""

from collections.abc import Iterator
from itertools import combinations
from math import prod
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, ValidationError

from model.config import BaseModelConfig, ModelConfig
from parallel.config import CompileConfig, ParallelConfig, Precision, RecomputeMode
from parallel.errors import LayoutError
from parallel.fit import check_async_tp, check_compile, check_fit, check_micro_batches, check_recomputation
from parallel.layout import SIZES, Layout, resolve_layout
from parallel.stages import MANY_STAGES, Schedule
from parallel.zero.fit import check_zero
from train.errors import ConfigError

OPTIONS = (
    "micro_batch_size=1",
    "activation_checkpoint=full",
    "activation_checkpoint=auto",
    "reshard_after_forward=false",
    "cpu_offload=true",
)
"""Tried with `dp_shard`."""

ZERO_OPTIONS = (
    "stage=0",
    "stage=1",
    "stage=2",
    "stage=2,micro_batch_size=1",
    "stage=2,offload_optimizer=cpu",
    "stage=3",
    "stage=3,activation_checkpoint=full",
    "stage=3,offload_optimizer=cpu,offload_param=cpu",
)
"""Tried with `dp_shard` and DeepSpeed."""

ZERO_KEYS = ("stage", "offload_optimizer", "offload_param")
"""Written without the section that they are in."""

Engine = Literal["torch", "deepspeed"]


class Arrangement(ParallelConfig):
    """A `parallel` section with every size given, and how a rank works on its share of a batch."""

    dp_shard: int = Field(1, ge=1)
    """Data-parallel ranks over which weights, gradients and optimizer state are sharded."""
    activation_checkpoint: RecomputeMode = "none"
    """`auto`: within a half of what the blocks would keep without."""
    compile: bool = False
    """Compile every block, which takes a while."""
    micro_batch_size: PositiveInt | None = None
    """Sequences. Unset: a half of a rank's share; in a pipeline, what makes two micro-batches for each of its ranks."""

    @property
    def layout(self) -> Layout:
        """Raises LayoutError where ep divides nothing."""
        return resolve_layout(self, prod(getattr(self, name) for name in SIZES))

    def micro_batch(self, global_batch_size: int) -> int:
        """Sequences of a micro-batch."""
        share = global_batch_size // self.layout.data_size
        return self.micro_batch_size or max(1, share // (2 * self.pp))

    def check(self, model: BaseModelConfig, precision: Precision, global_batch_size: int) -> None:
        """Raises LayoutError where the model, or the batch, can't be laid out so."""
        check_fit(self.layout, self, model, model.max_seq_len)
        check_recomputation(self.layout, self, self.activation_checkpoint)
        compilation = CompileConfig(enabled=self.compile)
        check_zero(self.layout, self, precision, compilation)
        check_compile(compilation, precision)
        check_async_tp(self.layout, self, compilation, precision, model, model.max_seq_len)
        ranks, size = self.layout.data_size, self.micro_batch(global_batch_size)
        if global_batch_size % (ranks * size):
            raise LayoutError(
                f"{global_batch_size} sequences are no micro-batches of {size} on {ranks} data-parallel rank(s): use "
                f"micro_batch_size=1, and powers of 2 for dp_replicate and dp_shard"
            )
        check_micro_batches(self, global_batch_size // ranks // size)


def parse(text: str) -> Arrangement:
    """Read `tp=2,sequence_parallel=false`; sizes that are left out are 1.

    Raises:
        ConfigError: it can't be read.
    """
    given: dict[str, Any] = {}
    keys = [*(name for name in Arrangement.model_fields if name != "deepspeed"), *ZERO_KEYS]
    for setting in text.split(","):
        key, equals, value = setting.strip().partition("=")
        if not equals or key not in keys:
            raise ConfigError(
                f"layout {text!r}: {setting!r} is not of the form tp=2, with one of {', '.join(keys)}"
            )
        if key in ZERO_KEYS:
            given.setdefault("deepspeed", {})[key] = int(value) if value.isdecimal() else value
        else:
            given[key] = value
    if "deepspeed" in given and given.get("engine") != "deepspeed":
        raise ConfigError(
            f"layout {text!r}: {next(iter(given['deepspeed']))} is DeepSpeed's: add engine=deepspeed"
        )
    try:
        return Arrangement.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"layout {text!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def arrangements(model: BaseModelConfig, world_size: int, engine: Engine = "torch") -> Iterator[str]:
    """What is sensible for a model on so many ranks with an engine."""
    return _with_zero(model, world_size) if engine == "deepspeed" else _with_fsdp(model, world_size)


def _with_zero(model: BaseModelConfig, world_size: int) -> Iterator[str]:
    """Every stage over data-parallel ranks, and with what they may be combined with."""
    whole = f"engine=deepspeed,dp_shard={world_size}"
    yield from (f"{whole},{option}" for option in ZERO_OPTIONS)
    if world_size == 1:
        return
    moe = isinstance(model, ModelConfig) and model.moe is not None
    for sizes in _meshes(world_size):
        if not sizes.keys() <= {"dp_shard", "tp", "cp"}:
            continue
        written = "engine=deepspeed," + ",".join(f"{name}={size}" for name, size in sizes.items())
        if written != whole:
            yield from (f"{written},stage={stage}" for stage in (1, 2, 3))
        shards = sizes.get("dp_shard", 1) * sizes.get("cp", 1)
        if moe and shards > 1:
            yield from (f"{written},ep={shards},stage={stage}" for stage in (1, 2))


def _with_fsdp(model: BaseModelConfig, world_size: int) -> Iterator[str]:
    """Everything that is sensible for a model on so many ranks: every dimension, all pairs (and threes) of them.

    Experts, where there are any, are shared out among as many ranks as can be.
    """
    whole = f"dp_shard={world_size}"
    yield whole
    yield from (f"{whole},{option}" for option in OPTIONS)
    if world_size == 1:
        yield f"{whole},compile=true"
        return
    moe = isinstance(model, ModelConfig) and model.moe is not None
    for sizes in _meshes(world_size):
        written = ",".join(f"{name}={size}" for name, size in sizes.items())
        if written != whole:
            yield written
        yield from (f"{written},{other}" for other in _variants(sizes, model))
        shards = sizes.get("dp_shard", 1) * sizes.get("cp", 1)
        if moe and shards > 1:
            yield f"{written},ep={shards}"


def _meshes(world_size: int) -> Iterator[dict[str, int]]:
    """Sizes of one, two or three dimensions, whose product is the world size, larger ones first."""
    for count in (1, 2, 3):
        for names in combinations(("dp_shard", "dp_replicate", "tp", "cp", "pp"), count):
            for sizes in _factors(world_size, count):
                yield dict(zip(names, sizes, strict=True))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Factors above 1, none above the one before, in so many places."""
    if count == 1:
        yield (number,)
        return
    for first in range(number // 2, 1, -1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1) if rest[0] <= first)


def _variants(sizes: dict[str, int], model: BaseModelConfig) -> Iterator[str]:
    if sizes.keys() == {"tp"}:
        yield "sequence_parallel=false"
        yield "activation_checkpoint=full"
        yield "activation_checkpoint=selective"
    if sizes == {"tp": 2}:
        yield "compile=true"
    if "cp" in sizes:
        yield "cp_method=ring"
    if sizes.keys() == {"cp"}:
        yield "cp_method=ring,activation_checkpoint=full"
    if sizes.keys() == {"pp"}:
        for schedule in get_args(Schedule):
            # two stages a rank are tried where there are the layers for it
            if schedule != "1f1b" and not (schedule in MANY_STAGES and 2 * sizes["pp"] > model.num_layers):
                yield f"pp_schedule={schedule}"
        yield "activation_checkpoint=auto"
