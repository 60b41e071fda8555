"""Plans of big jobs against a simulated step of one of their ranks, as a table for docs/planner.md.

python -m benchmarks.plan_simulated
"""

import time
import warnings
from functools import partial

from parallel.planner.compare import compare
from parallel.planner.hardware import load_device
from parallel.planner.simulate import simulate
from train.optimizer import make_optimizer
from train.plan import Budget, load_for_plan, make_plan

JOBS = [
    ("1b", 64, []),
    ("7b", 1024, ["parallel.tp=2", "data.global_batch_size=1024"]),
    ("70b", 4096, ["parallel.tp=8", "parallel.dp_replicate=2"]),
    ("70b", 4096, ["parallel.tp=8", "parallel.pp=4", "activation_checkpoint.mode=selective"]),
    ("405b", 16384, ["parallel.tp=8", "parallel.pp=16", "parallel.cp=2"]),
    ("moe-8x7b", 1024, ["parallel.ep=8", "data.global_batch_size=1024"]),
]


def main() -> None:
    """Print the table."""
    print("| configuration | ranks | layout | memory, GB | FLOPs, T | traffic, GB | seconds |")
    print("|---|---|---|---|---|---|---|")
    warnings.simplefilter("ignore", UserWarning)
    for name, ranks, overrides in JOBS:
        began = time.perf_counter()
        config = load_for_plan(name, overrides)
        best = make_plan(config, ranks, load_device("h100-80gb"), Budget(), as_given=True).best
        step = simulate(best.run, best.arrangement, 0, partial(make_optimizer, config=config.optimizer))
        compared = compare(best.run, best.arrangement, 0, step)
        cells = []
        for group, size in (("memory", 1e9), ("FLOPs", 1e12), ("traffic", 1e9)):
            figure = compared.total(group)  # type: ignore[arg-type]
            cells.append(
                f"{figure.planned / size:,.2f} / {figure.simulated / size:,.2f}, {figure.deviation or 0:+.1%}"
            )
        layout = f"{best.arrangement.layout}, {config.activation_checkpoint.mode}"
        print(
            f"| {name} | {ranks:,} | {layout} | {' | '.join(cells)} | {time.perf_counter() - began:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
