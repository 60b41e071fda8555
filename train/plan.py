"""A plan of a run: the layout, what it takes of memory, time and money, and what the compute would be best spent on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from model.count import flops_per_token, parameter_count
from parallel.config import ActivationCheckpointConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.fit import HAS_STAGES, check_fit, check_fp8, check_micro_batches
from parallel.layout import SIZES, Layout, resolve_layout
from parallel.planner.activations import resolve
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.memory import predict_memory
from parallel.planner.moments import Memory
from parallel.planner.search import search
from parallel.stages import IN_HALVES
from parallel.zero.fit import refusals
from train.config import Config
from train.config_file import load_config
from train.errors import ConfigError
from train.scaling import recommend

DAY, HOUR = 86_400.0, 3_600.0
LAYOUT_KEYS = (
    *("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep"),
    *("reshard_after_forward", "sequence_parallel", "engine", "cpu_offload"),
)
PIPELINE_KEYS = ("pp_schedule", "stages_per_rank")
CONTEXT_KEYS = ("cp_method",)
UNUSED = ("data.path=unused", "run.wall_time=1h", "schedule.total_steps=1000000000")
"""A plan reads no data; and a run without an end has the tokens that are best for its size."""


@dataclass(frozen=True)
class Budget:
    """How long a run is to be; of the three one, or none: as the configuration says."""

    flops: float | None = None
    days: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.flops, self.days, self.tokens)) > 1:
            raise ConfigError("--flops, --days and --tokens all say how long the run is: give one of them")


@dataclass(frozen=True)
class Training:
    """What a whole run takes in a layout."""

    best: Estimate
    tokens: float

    @property
    def flops(self) -> float:
        """Of the model, recomputation not counted."""
        return self.tokens * flops_per_token(self.best.run.model, self.best.run.seq_len)

    @property
    def seconds(self) -> float:
        """From the first step to the last, nothing going wrong."""
        return self.tokens / self.best.tokens_per_second

    @property
    def days(self) -> float:
        """The same."""
        return self.seconds / DAY

    @property
    def device_hours(self) -> float:
        """Of all devices."""
        return self.seconds / HOUR * self.best.arrangement.layout.world_size

    @property
    def dollars(self) -> float:
        """At the catalogue's rent."""
        return self.device_hours * self.best.device.dollars_per_hour

    @property
    def megawatt_hours(self) -> float:
        """Of the devices alone, at full power: hosts, network and cooling come on top."""
        return self.device_hours * self.best.device.watts / 1e6

    @property
    def optimum(self) -> tuple[float, float]:
        """Parameters and tokens that the same FLOPs would be best spent on, at 20 tokens each (Hoffmann et al. 2022).

        FLOPs are 6 for each parameter and token there, and the same share more here as for this model.
        """
        params = parameter_count(self.best.run.model).active
        factor = flops_per_token(self.best.run.model, self.best.run.seq_len) / params
        best = math.sqrt(self.flops / (factor * recommend.TOKENS_PER_PARAMETER))
        return best, best * recommend.TOKENS_PER_PARAMETER


@dataclass(frozen=True)
class Plan:
    """What `trireme plan` shows."""

    training: Training
    rivals: list[Estimate]
    """The next best layouts."""
    too_large: list[Estimate]
    """Layouts that don't fit."""
    weighed: int
    """How many layouts were looked at."""
    pasted: list[str]
    """The keys that make the configuration have the best."""

    @property
    def best(self) -> Estimate:
        """The layout that is recommended."""
        return self.training.best


def load_for_plan(path_or_name: str, overrides: Sequence[str]) -> Config:
    """A configuration, of which data and end may be missing.

    Raises:
        ConfigError: anything wrong with it.
    """
    return load_config(path_or_name, [*UNUSED, *overrides]).config


def make_plan(
    config: Config, world_size: int, device: Device, budget: Budget, *, as_given: bool = False
) -> Plan:
    """The best layout, or the configuration's own.

    Raises:
        ConfigError, LayoutError: what can't be, and what would do.
    """
    run = run_facts(config)
    device.peak_flops(run.precision)
    if as_given:
        layout = resolve_layout(config.parallel, world_size)
        best = estimate(run, arrangement_of(config, layout, device), device)
        return Plan(Training(best, _tokens(config, best, budget)), [], [], 1, overrides_of(best, config))
    found = search(run, world_size, device, given=config.parallel)
    best, *rivals = found.fitting
    return Plan(
        Training(best, _tokens(config, best, budget)),
        rivals,
        found.too_large,
        found.weighed,
        overrides_of(best, config),
    )


def memory_of(config: Config, layout: Layout, device: Device) -> Memory:
    """What a rank of a configuration needs at most, for who is about to start it.

    Raises:
        ConfigError, LayoutError: the configuration is one that can't be planned, or laid out so.
    """
    return predict_memory(run_facts(config), arrangement_of(config, layout, device), device)


def run_facts(config: Config) -> RunFacts:
    """What of a configuration a plan is made from.

    Raises:
        ConfigError: it is of another model or engine, or the vocabulary isn't known.
    """
    model = config.model
    if not isinstance(model, ModelConfig) or model.type not in HAS_STAGES:
        raise ConfigError(
            f"model.type={model.type} can't be planned: use one of {', '.join(HAS_STAGES)}, whose layers are alike"
        )
    if model.vocab_size is None:
        raise ConfigError("a plan must know the vocabulary: set model.vocab_size, 32000 for example")
    return RunFacts(
        model,
        model.max_seq_len,
        config.data.global_batch_size,
        config.precision,
        config.compile.enabled,
    )


def arrangement_of(config: Config, layout: Layout, device: Device) -> Arrangement:
    """A configuration's own layout, checked as a run checks it.

    Raises:
        LayoutError, ConfigError: it can't be.
    """
    schedule, mode = config.parallel.pp_schedule, config.activation_checkpoint.mode
    if schedule in IN_HALVES and mode != "none":
        raise ConfigError(
            f"parallel.pp_schedule={schedule} with activation_checkpoint.mode={mode} can't be planned: use "
            f"parallel.pp_schedule=interleaved_1f1b, or activation_checkpoint.mode=none"
        )
    sizes = {name: getattr(layout, name) for name in SIZES}
    parallel = config.parallel.model_copy(update=sizes)
    model = config.model
    check_fit(layout, parallel, model, model.max_seq_len)
    check_fp8(layout, parallel, model, config.precision)
    if parallel.engine == "deepspeed":
        for refusal in refusals(layout, parallel, config.precision, config.compile):
            raise LayoutError(refusal)
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    count, left = divmod(whole, micro * layout.data_size)
    if left or not count:
        raise ConfigError(
            f"data.global_batch_size={whole} is not a multiple of data.micro_batch_size x data-parallel ranks = "
            f"{micro} x {layout.data_size}: set data.global_batch_size={max(1, count) * micro * layout.data_size}"
        )
    check_micro_batches(parallel, count)
    given = Arrangement(parallel, micro, config.activation_checkpoint)
    return resolve(run_facts(config), given, device.type)


def _tokens(config: Config, best: Estimate, budget: Budget) -> float:
    per_step = best.run.tokens_per_step
    if budget.tokens is not None:
        tokens, said = budget.tokens, f"--tokens {budget.tokens:g}"
    elif budget.flops is not None:
        tokens = budget.flops / flops_per_token(best.run.model, best.run.seq_len)
        said = f"--flops {budget.flops:g}"
    elif budget.days is not None:
        tokens, said = budget.days * DAY * best.tokens_per_second, f"--days {budget.days:g}"
    elif config.run.tokens is not None:
        return float(config.run.tokens)
    elif config.run.steps is not None:
        return float(config.run.steps * per_step)
    else:
        return recommend.TOKENS_PER_PARAMETER * parameter_count(best.run.model).active
    if tokens < per_step:
        raise ConfigError(
            f"{said} comes to {tokens:.3g} tokens, less than the {per_step:.3g} of a step: give "
            f"{math.ceil(per_step / tokens)} times as much, or a smaller data.global_batch_size"
        )
    return tokens


def overrides_of(found: Estimate, config: Config) -> list[str]:
    """The keys that give a configuration this layout: those that it or the default has otherwise, and a few always."""
    arrangement = found.arrangement
    parallel, given = arrangement.parallel, config.parallel
    defaults = vars(ParallelConfig()) | {
        "stages_per_rank": ParallelConfig(pp_schedule=parallel.pp_schedule).stages_per_rank
    }
    keys: dict[str, object] = {}
    more = *(PIPELINE_KEYS if parallel.pp > 1 else ()), *(CONTEXT_KEYS if parallel.cp > 1 else ())
    for name in (*LAYOUT_KEYS, *more):
        value = getattr(parallel, name)
        differs = name in given.model_fields_set and getattr(given, name) != value
        if value != defaults[name] or differs:
            keys[f"parallel.{name}"] = value
    if parallel.engine == "deepspeed":
        keys["parallel.deepspeed.stage"] = parallel.deepspeed.stage
    keys["data.micro_batch_size"] = arrangement.micro_batch_size
    keys |= _recomputation(arrangement.activation_checkpoint)
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()
    ]


def _recomputation(config: ActivationCheckpointConfig) -> dict[str, object]:
    keys: dict[str, object] = {"activation_checkpoint.mode": config.mode}
    if config.mode == "every_nth":
        keys["activation_checkpoint.n"] = config.n
    if config.mode == "auto":
        keys["activation_checkpoint.memory_budget"] = config.memory_budget
    return keys


def why_it_loses(rival: Estimate, best: Estimate) -> str:
    """The parts of time that it takes more of, the largest first; or that it is no faster for cutting more."""
    more = {name: rival.time.parts[name] - seconds for name, seconds in best.time.parts.items()}
    slower = rival.time.total - best.time.total
    if slower <= 0:
        return f"{-slower / best.time.total:.1%} faster, for more cuts of the model"
    worst = sorted(more, key=lambda name: -more[name])[:2]
    return ", ".join(f"{format_seconds(more[name])} more {name}" for name in worst if more[name] > 0)


def format_seconds(seconds: float) -> str:
    """`21.3 s`, `540 ms`, `12 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
