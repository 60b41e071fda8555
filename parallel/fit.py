"""Whether a model and its sequences can be laid out so. Light to import: it is checked before anything starts."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version

from model.attention_config import AttentionConfig
from model.config import BaseModelConfig, ModelConfig, known
from model.encoder_decoder.config import EncoderDecoderConfig
from parallel.config import CompileConfig, ParallelConfig, Precision, RecomputeMode
from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.sizes import format_bytes
from parallel.stages import IN_HALVES, MANY_STAGES

BYTES: dict[Precision, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Of a number in an activation."""

FP8_MULTIPLE = 16
"""What the sizes of a product of 8-bit floats are multiples of."""

HAS_STAGES = ("transformer", "flow_matching", "image_codes")
"""Models whose layers are in one row."""

SPLITS_SEQUENCES = ("transformer", "image_codes")
"""Models that can work on a part of a sequence."""


ALL_WORKS = (2, 13)
"""Of torch: versions before it cut the backward of a pipeline's stage wrongly in two, or not at all, find few of the
products that collectives can be made with, and compile attention's backward wrongly in fp64."""


@cache
def installed_torch() -> str:
    """Its version, read once: a search checks thousands of layouts."""
    return version("torch")


def torch_version() -> tuple[int, int]:
    """Of the torch that is installed."""
    major, minor = installed_torch().split(".")[:2]
    return int(major), int(minor)


def _check_torch(setting: str, works: str) -> None:
    if torch_version() < ALL_WORKS:
        raise LayoutError(
            f"{setting} needs torch {'.'.join(map(str, ALL_WORKS))}, and here is {installed_torch()}: use {works}"
        )


def check_fit(layout: Layout, parallel: ParallelConfig, model: BaseModelConfig, seq_len: int) -> None:
    """Raises LayoutError, with the nearest size that works, where the model can't be laid out so."""
    if not isinstance(model, ModelConfig):
        _refuse_all_but_data(layout, model)
        return
    if layout.pp > 1:
        _check_pipeline(parallel, model)
    if layout.tp > 1:
        _check_tensor(layout.tp, model)
    if layout.cp > 1:
        _check_context(layout, parallel, model, seq_len)
    if layout.ep > 1:
        _check_experts(layout.ep, model)


def _refuse_all_but_data(layout: Layout, model: BaseModelConfig) -> None:
    for name in ("pp", "cp", "tp", "ep"):
        if getattr(layout, name) > 1:
            raise LayoutError(
                f"parallel.{name}={getattr(layout, name)}: a model of type {model.type} is no transformer, and is "
                f"laid out over data-parallel ranks only: use parallel.{name}=1 and more of parallel.dp_shard"
            )


def _check_pipeline(parallel: ParallelConfig, model: ModelConfig) -> None:
    schedule, stages = parallel.pp_schedule, parallel.num_stages
    if model.type not in HAS_STAGES:
        raise LayoutError(
            f"parallel.pp={parallel.pp}: a model of type {model.type} can't be cut into stages: use parallel.pp=1, "
            f"and parallel.tp or dp_shard"
        )
    if stages > model.num_layers:
        raise LayoutError(
            f"parallel.pp={parallel.pp} with {parallel.stages_per_rank} stage(s) on a rank are {stages} stages, more "
            f"than model.num_layers={model.num_layers}: use parallel.pp="
            f"{max(1, model.num_layers // (parallel.stages_per_rank or 1))}"
        )
    if model.tie_embeddings and schedule == "zbv_zero_bubble":
        raise LayoutError(
            "parallel.pp_schedule=zbv_zero_bubble has the first and the last stage on one rank, each with an embedding "
            "of its own: use model.tie_embeddings=false, or parallel.pp_schedule=interleaved_zero_bubble"
        )
    if model.positional.encoding == "relative" and schedule in MANY_STAGES:
        raise LayoutError(
            f"parallel.pp_schedule={schedule} has several stages on a rank, each with the positions that "
            f"model.positional.encoding=relative learns: use parallel.pp_schedule=1f1b"
        )
    if model.moe is not None and schedule in IN_HALVES:
        raise LayoutError(
            f"parallel.pp_schedule={schedule} cuts the backward in two, which experts' (model.moe) can't be: use "
            f"parallel.pp_schedule=interleaved_1f1b"
        )
    if schedule in IN_HALVES:
        _check_torch(f"parallel.pp_schedule={schedule}", "parallel.pp_schedule=interleaved_1f1b")


def check_micro_batches(parallel: ParallelConfig, count: int) -> None:
    """Raises LayoutError where a rank's micro-batches of a step are not as many as the pipeline's schedule needs."""
    if parallel.pp == 1:
        return
    several = parallel.pp_schedule in MANY_STAGES
    fits = count % max(1, count // parallel.pp) == 0 if several else count >= parallel.num_stages
    if parallel.pp_schedule == "gpipe" or (fits and count >= (1 if several else parallel.pp)):
        return
    wanted = -(-count // parallel.pp) * parallel.pp
    raise LayoutError(
        f"parallel.pp_schedule={parallel.pp_schedule} over parallel.pp={parallel.pp} ranks can't do {count} "
        f"micro-batch(es) a step: make it {wanted} by data.global_batch_size or data.micro_batch_size"
    )


def check_fp8(layout: Layout, parallel: ParallelConfig, model: BaseModelConfig, precision: Precision) -> None:
    """Raises LayoutError where blocks' linear layers can't compute in 8 bits, as far as that is seen from afar."""
    if precision != "fp8":
        return
    if not isinstance(model, ModelConfig):
        raise LayoutError(
            f"precision=fp8: a model of type {model.type} is no transformer, whose blocks have the linear layers that "
            f"compute in 8 bits: use precision=bf16"
        )
    head_dim, kv_heads = known(model.attention.head_dim), known(model.attention.num_kv_heads)
    if kv_heads % layout.tp and head_dim % FP8_MULTIPLE:
        raise LayoutError(
            f"precision=fp8: parallel.tp={layout.tp} leaves each rank one kv head of {head_dim} features, and 8-bit "
            f"products want multiples of {FP8_MULTIPLE}: use parallel.tp="
            f"{_nearest(layout.tp, lambda tp: kv_heads % tp == 0)}"
        )
    if layout.pp > 1 and parallel.pp_schedule in IN_HALVES:
        raise LayoutError(
            f"parallel.pp_schedule={parallel.pp_schedule} cuts the backward in two, which that of precision=fp8 can't "
            f"be: use parallel.pp_schedule=interleaved_1f1b, or precision=bf16"
        )


def check_compile(compilation: CompileConfig, precision: Precision) -> None:
    """Raises LayoutError where blocks can't be compiled so."""
    if compilation.enabled and precision == "fp64":
        _check_torch("compile.enabled=true with precision=fp64", "precision=fp32")


def check_async_tp(
    layout: Layout,
    parallel: ParallelConfig,
    compilation: CompileConfig,
    precision: Precision,
    model: BaseModelConfig,
    seq_len: int,
) -> None:
    """Raises LayoutError where the compiler would find no product beside a collective that it knows."""
    if not parallel.async_tp:
        return
    checks: tuple[tuple[bool, str, str], ...] = (
        (not compilation.enabled, "the compiler does it, and compile.enabled=false", "compile.enabled=true"),
        (parallel.engine == "deepspeed", "it is of parallel.engine=torch", "that"),
        (precision == "fp8", "precision=fp8 has products of its own", "precision=bf16"),
        (
            seq_len % layout.tp != 0,
            f"parallel.tp={layout.tp} doesn't divide sequences of {seq_len} tokens, which are padded then",
            f"parallel.tp={_nearest(layout.tp, lambda tp: seq_len % tp == 0)}",
        ),
        *(
            (
                biased,
                f"model.{section}.bias=true has sums that are made with the products",
                f"model.{section}.bias=false",
            )
            for section, biased in _biases(model)
        ),
    )
    for refused, why, works in checks:
        if refused:
            raise LayoutError(f"parallel.async_tp=true: {why}: use {works}, or parallel.async_tp=false")
    _check_torch("parallel.async_tp=true", "parallel.async_tp=false")


def _biases(model: BaseModelConfig) -> list[tuple[str, bool]]:
    """Whether the linear layers of blocks have biases, by their section."""
    return [(name, bool(getattr(getattr(model, name, None), "bias", False))) for name in ("attention", "ffn")]


def check_recomputation(layout: Layout, parallel: ParallelConfig, mode: RecomputeMode) -> None:
    """Raises LayoutError where a schedule can't have what was computed be computed again so."""
    if layout.pp > 1 and parallel.pp_schedule in IN_HALVES and mode in ("selective", "auto"):
        raise LayoutError(
            f"parallel.pp_schedule={parallel.pp_schedule} cuts the backward in two, which that of "
            f"activation_checkpoint.mode={mode} can't be: use none or full, or parallel.pp_schedule=interleaved_1f1b"
        )


def check_budget(
    layout: Layout,
    parallel: ParallelConfig,
    precision: Precision,
    model: BaseModelConfig,
    budget: int | None,
    micro_batch: tuple[int, int],
) -> None:
    """Raises LayoutError where no recomputation can keep the blocks' activations of (B, T) within a budget in bytes.

    A block that recomputes all still keeps its input. What experts keep beyond that is measured later.
    """
    if budget is None or not isinstance(model, ModelConfig):
        return
    batch, length = micro_batch
    tokens = model.num_layers * length
    if isinstance(model, EncoderDecoderConfig):
        tokens += model.encoder.num_layers * model.memory_len
    ranks = layout.pp * layout.cp * (layout.tp if parallel.sequence_parallel else 1)
    smallest = batch * -(-tokens // ranks) * model.d_model * BYTES[precision]
    if smallest > budget:
        raise too_small(budget, smallest)


def too_small(budget: int, smallest: int) -> LayoutError:
    """What is said of a budget for activations that even full recomputation can't keep to; both in bytes."""
    return LayoutError(
        f"activation_checkpoint.memory_budget={format_bytes(budget)} is less than what blocks keep of one "
        f"micro-batch if all recompute: set at least {format_bytes(smallest)}, or use a smaller "
        f"data.micro_batch_size or more of parallel.cp, parallel.tp or parallel.pp"
    )


def _check_tensor(tp: int, model: ModelConfig) -> None:
    heads, kv_heads = model.attention.num_heads, known(model.attention.num_kv_heads)

    def heads_fit(ranks: int) -> bool:
        return heads % ranks == 0 and _shares(kv_heads, ranks)

    if not heads_fit(tp):
        raise LayoutError(
            f"parallel.tp={tp} can't share out model.attention.num_heads={heads} and num_kv_heads={kv_heads}, of "
            f"which each rank takes as many, or several ranks one kv head: use parallel.tp={_nearest(tp, heads_fit)}"
        )
    widths = {"model.vocab_size": known(model.vocab_size), "model.ffn.d_ff": known(model.ffn.d_ff)}
    for name, width in widths.items():
        if -(-width // tp) * (tp - 1) >= width:
            raise LayoutError(
                f"parallel.tp={tp} leaves ranks without a share of {name}={width}: use a smaller parallel.tp"
            )


def _check_context(layout: Layout, parallel: ParallelConfig, model: ModelConfig, seq_len: int) -> None:
    cp = layout.cp
    if model.type not in SPLITS_SEQUENCES:
        raise LayoutError(
            f"parallel.cp={cp}: a model of type {model.type} can't work on a part of a sequence: use parallel.cp=1, "
            f"and parallel.tp for long sequences"
        )
    if parallel.cp_method == "ring":
        _check_ring(cp, model.attention, seq_len)
    else:
        _check_heads(layout, model, seq_len)


def _check_ring(cp: int, attention: AttentionConfig, seq_len: int) -> None:
    if attention.variant == "linear":
        raise LayoutError(
            "parallel.cp_method=ring puts softmaxes over parts of the keys together, and "
            "model.attention.variant=linear has none: use parallel.cp_method=heads"
        )
    if attention.kernel == "flex":
        raise LayoutError(
            "parallel.cp_method=ring goes block by block, which model.attention.kernel=flex can't: use "
            "model.attention.kernel=auto, or parallel.cp_method=heads"
        )
    if seq_len % (2 * cp):
        nearest = _nearest(cp, lambda ranks: seq_len % (2 * ranks) == 0)
        raise LayoutError(
            f"parallel.cp={cp} with parallel.cp_method=ring gives each rank two runs of a sequence, and {seq_len} "
            f"tokens are no {2 * cp} equal runs: use parallel.cp={nearest}"
        )


def _check_heads(layout: Layout, model: ModelConfig, seq_len: int) -> None:
    cp = layout.cp
    heads = model.attention.num_heads // layout.tp
    kv_heads = max(1, known(model.attention.num_kv_heads) // layout.tp)

    def heads_fit(ranks: int) -> bool:
        return heads % ranks == 0 and _shares(kv_heads, ranks)

    if not heads_fit(cp):
        goes_round = model.attention.variant != "linear" and seq_len % (2 * cp) == 0
        ring = ", or parallel.cp_method=ring" if goes_round else ""
        raise LayoutError(
            f"parallel.cp={cp} can't share out the {heads} heads and {kv_heads} kv heads that model.attention has on "
            f"each rank (parallel.tp={layout.tp}): use parallel.cp={_nearest(cp, heads_fit)}{ring}"
        )
    if seq_len % cp:
        raise LayoutError(
            f"parallel.cp={cp} doesn't divide the sequences of {seq_len} tokens: use parallel.cp="
            f"{_nearest(cp, lambda ranks: seq_len % ranks == 0 and heads_fit(ranks))}"
        )


def _check_experts(ep: int, model: ModelConfig) -> None:
    if model.moe is None:
        raise LayoutError(f"parallel.ep={ep}: the model has no experts (model.moe): use parallel.ep=1")
    experts = model.moe.num_experts
    if experts % ep:
        raise LayoutError(
            f"parallel.ep={ep} doesn't divide model.moe.num_experts={experts}: use parallel.ep="
            f"{_nearest(ep, lambda ranks: experts % ranks == 0)}"
        )


def _shares(kv_heads: int, ranks: int) -> bool:
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def _nearest(wanted: int, works: Callable[[int], bool]) -> int:
    """The largest size up to the one wanted that works; 1 always does."""
    return next(size for size in range(wanted, 0, -1) if works(size))
