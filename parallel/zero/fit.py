"""What DeepSpeed can't do, with what can. Light to import: it is checked before anything starts."""

from collections.abc import Iterator

from parallel.config import CompileConfig, ParallelConfig, Precision
from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.zero.library import check_installed


def check_zero(
    layout: Layout,
    parallel: ParallelConfig,
    precision: Precision,
    compilation: CompileConfig,
) -> None:
    """Raises LayoutError where the engine deepspeed can't run what is asked for; of another engine it says nothing."""
    if parallel.engine != "deepspeed":
        return
    check_installed()
    for refusal in refusals(layout, parallel, precision, compilation):
        raise LayoutError(refusal)


def refusals(
    layout: Layout,
    parallel: ParallelConfig,
    precision: Precision,
    compilation: CompileConfig,
) -> Iterator[str]:
    """Why the engine deepspeed can't run what is asked for."""
    zero = parallel.deepspeed
    asked = f"parallel.engine=deepspeed with parallel.deepspeed.stage={zero.stage}"
    if layout.pp > 1:
        yield (
            f"parallel.pp={layout.pp}: DeepSpeed's pipeline takes a list of layers, with schedules of its own and no "
            f"ZeRO 2 or 3: use parallel.engine=torch, or parallel.pp=1"
        )
    if layout.dp_replicate > 1:
        yield (
            f"parallel.dp_replicate={layout.dp_replicate}: parallel.engine=deepspeed partitions over all data-parallel "
            f"ranks: use parallel.dp_replicate=1, or parallel.deepspeed.config with zero_hpz_partition_size"
        )
    if precision == "fp64":
        yield "precision=fp64: DeepSpeed keeps its weights in fp32: use parallel.engine=torch, or precision=fp32"
    if precision == "fp8":
        yield "precision=fp8 is of parallel.engine=torch: use that, or precision=bf16"
    if layout.ep > 1 and zero.stage in (0, 3):
        yield (
            f"parallel.ep={layout.ep}: {asked} can't partition experts that ranks share out: use "
            f"parallel.deepspeed.stage=1 or 2, or parallel.ep=1"
        )
    if compilation.enabled and zero.stage == 3:
        yield (
            f"compile.enabled=true: {asked} gathers weights in hooks that can't be compiled: use "
            f"parallel.deepspeed.stage=2, or parallel.engine=torch"
        )
    if not parallel.reshard_after_forward:
        yield (
            "parallel.reshard_after_forward=false is of parallel.engine=torch: leave it out, and use "
            "parallel.deepspeed.stage=2 to keep weights gathered"
        )
    if parallel.cpu_offload:
        yield (
            "parallel.cpu_offload=true is of parallel.engine=torch: use parallel.deepspeed.offload_optimizer=cpu, and "
            "with stage 3 offload_param=cpu"
        )
