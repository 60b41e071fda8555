"""Time for one rank of 512 to generate its share of the 70B preset's initial weights.

python -m benchmarks.initialize
"""

import time
from dataclasses import replace

from model.count import parameter_count
from parallel.apply import lay_out
from parallel.config import ParallelConfig
from parallel.engine import EngineConfig
from parallel.gradients import local
from parallel.layout import resolve_layout
from parallel.mesh import Mesh
from parallel.simulate import simulated_rank
from train.config_file import load_config
from train.run import engine_config

RANKS, RANK = 512, 300
LAYOUTS: list[dict[str, int]] = [{}, {"tp": 8}, {"tp": 8, "pp": 8}]


def main() -> None:
    """Print a line for each layout."""
    config = load_config("70b", ["run.steps=1", "data.path=unused"]).config
    print(
        f"{parameter_count(config.model).total:,} parameters on {RANKS} ranks; rank {RANK}, fp32 on the CPU"
    )
    for sizes in LAYOUTS:
        layout = resolve_layout(ParallelConfig(**sizes), RANKS)
        told = engine_config(config, config.model.max_seq_len)
        own, seconds = generate(replace(told, parallel=ParallelConfig(**sizes)))
        print(f"{layout!s:36} {own:13,} numbers {seconds:6.1f} s {own / seconds / 1e6:6.1f} M numbers/s")


def generate(config: EngineConfig) -> tuple[int, float]:
    """The numbers that a rank has in the end, and the seconds that it took, of building and sharding too."""
    with simulated_rank(RANK, RANKS):
        began = time.perf_counter()
        mesh = Mesh(resolve_layout(config.parallel, RANKS), "cpu")
        laid_out = lay_out(config, mesh, None)
        seconds = time.perf_counter() - began
        parameters = [p for stage in laid_out.models for p in stage.parameters()]
        return sum(local(parameter).numel() for parameter in parameters), seconds


if __name__ == "__main__":
    main()
