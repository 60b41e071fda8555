"""The layouts that `trireme plan` recommends for the presets, as a table for docs/planner.md.

python -m benchmarks.layouts [h100-80gb]
"""

import sys

from parallel.errors import LayoutError
from parallel.planner.hardware import Device, load_device
from train.config import Config
from train.plan import Budget, load_for_plan, make_plan

PRESETS = ("1b", "3b", "7b", "13b", "30b", "70b", "405b", "moe-8x1b", "moe-8x7b", "moe-64x1b")
SIZES = (8, 64, 512, 4096)


def main() -> None:
    """Print the table."""
    device = load_device(sys.argv[1] if len(sys.argv) > 1 else "h100-80gb")
    print(f"| preset | {' | '.join(f'{size:,} GPUs' for size in SIZES)} |")
    print(f"|{'---|' * (len(SIZES) + 1)}", flush=True)
    for preset in PRESETS:
        config = load_for_plan(preset, [])
        cells = (_cell(config, size, device) for size in SIZES)
        print(f"| {preset} | {' | '.join(cells)} |", flush=True)


def _cell(config: Config, size: int, device: Device) -> str:
    try:
        plan = make_plan(config, size, device, Budget())
    except LayoutError:
        return "-"
    return f"`{_written(plan.pasted)}` {plan.best.utilization:.0%}"


def _written(overrides: list[str]) -> str:
    short = (each.partition(".")[2] for each in overrides)
    return " ".join(short).replace(" mode=none", "")


if __name__ == "__main__":
    main()
