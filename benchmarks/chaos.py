"""A run under a storm of faults ends with the weights it would have had.

python -m benchmarks.chaos [--faults 50] [--seed 0] [--folder DIR]

Trains a tiny model in two processes, once undisturbed and once under a seeded schedule of faults
(`benchmarks.faults.schedule`), and gives the command again each time it ends, as a user or a cluster would. Compares
the final weights and optimizer state, and every step's loss, gradient norm and order of the data, to the last bit.
Ends with 1 where something differs, or a fault went otherwise than it should.

Some steps' gradients aren't finite, in both runs, since such a step changes what the run computes. For the same reason
spikes that are rolled back are left to `tests/train/test_faults.py`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.faults.deal import Run
from benchmarks.faults.plan import Plan
from benchmarks.faults.schedule import Fault, draw
from benchmarks.faults.storm import Outcome, Storm
from data.prepare import prepare
from train.checkpoint_folder import complete
from train.run_folder import RunFolder, read_metrics

RANKS = 2
SPACING = 6
"""Steps from a fault to the next, on the average."""
NAN_EVERY = 37
"""Of so many steps, one has no finite gradient."""
_CLUSTER_SECONDS = 54 * 24 * 3600 / 466
"""From an interruption to the next: 466 in 54 days (Dubey et al. 2024, The Llama 3 Herd of Models, 3.3.4)."""
_COMPARED = ("step", "loss", "grad_norm", "skipped_steps", "data_order_digest")


@dataclass(frozen=True)
class Comparison:
    """A run under faults beside the undisturbed one."""

    outcomes: list[Outcome]
    seconds: float
    """That the disturbed run took, with all its starts."""
    useful: float
    """Of them, those of the steps that count."""
    wrong: list[str]
    """What differs, and which faults went otherwise than they should."""


def main(count: int, seed: int, folder: Path) -> int:
    """Print the report. Returns how many things were wrong."""
    found = compare(folder, draw(count, seed, RANKS, SPACING), say=print)
    print("\n".join([*report(found), *found.wrong]))
    return len(found.wrong)


def compare(folder: Path, faults: list[Fault], say: Callable[[str], None]) -> Comparison:
    """Train with and without faults in a folder."""
    config = write_config(folder, steps=(len(faults) + 2) * SPACING)
    trained(folder, config, "calm", [])
    began = time.monotonic()
    outcomes = trained(folder, config, "storm", faults, say)
    seconds = time.monotonic() - began
    calm, storm = (RunFolder(folder / name) for name in ("calm", "storm"))
    wrong = [f"{outcome.fault}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    useful = sum(row["step_seconds"] for row in read_metrics(storm))
    return Comparison(outcomes, seconds, useful, wrong + differences(calm, storm))


def write_config(folder: Path, steps: int) -> Path:
    """A configuration of a tiny model on data of its own."""
    source = folder / "source"
    source.mkdir()
    for number in range(40):
        lines = [f"{number} oars in {line * number % 97} rows pull in step" for line in range(60)]
        (source / f"{number:02}.txt").write_text("\n".join(lines))
    options = {"vocab_size": 300, "seq_len": 32, "validation_fraction": 0.1, "workers": 1}
    prepare([str(source)], folder / "data", **options)  # type: ignore[arg-type]
    tree = {
        "run": {"dir": str(folder), "steps": steps},
        "model": {
            "d_model": 32,
            "num_layers": 2,
            "max_seq_len": 32,
            "vocab_size_multiple": 8,
            "dropout": 0.1,
            "attention": {"num_heads": 4, "num_kv_heads": 2},
            "ffn": {"d_ff": 64},
        },
        "data": {
            "path": str(folder / "data"),
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "num_workers": 0,
        },
        "parallel": {"dp_replicate": RANKS},
        "checkpoint": {"every_steps": 4, "keep": 3},
        "faults": {"hang_timeout": "30s", "compare_every_steps": 1},
        "monitor": {"tensorboard": False},
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def trained(
    folder: Path, config: Path, name: str, faults: list[Fault], say: Callable[[str], None] = lambda line: None
) -> list[Outcome]:
    """Train a run to its end under faults. Returns what became of them."""
    plan = Plan(folder / f"{name}-plan")
    plan.write(faults, NAN_EVERY)
    run = Run(RunFolder(folder / name), folder / "data", plan, config, len(faults), folder / f"{name}.log")
    return Storm(run, faults, say).pass_over()


def differences(calm: RunFolder, storm: RunFolder) -> list[str]:
    """In what two runs differ."""
    ours, theirs = read_metrics(calm), read_metrics(storm)
    found = (
        [] if len(ours) == len(theirs) else [f"{len(theirs)} steps in the metrics, undisturbed {len(ours)}"]
    )
    for mine, other in zip(ours, theirs, strict=False):
        found += [
            f"step {mine['step']}: {key} {other[key]}, undisturbed {mine[key]}"
            for key in _COMPARED
            if repr(mine[key]) != repr(other[key])  # NaN equals itself
        ]
    tensors, others = dict(_tensors(calm)), dict(_tensors(storm))
    found += [f"{name} is in one alone" for name in tensors.keys() ^ others.keys()]
    return found + [
        f"{name} differs"
        for name in tensors.keys() & others.keys()
        if not torch.equal(tensors[name], others[name])
    ]


def _tensors(folder: RunFolder) -> Iterator[tuple[str, Tensor]]:
    """Those of the last checkpoint, by file and name."""
    for file in complete(folder.checkpoints)[-1].rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            yield f"{file.name}/{name}", tensor


def report(found: Comparison) -> list[str]:
    """The lines of it."""
    lost: dict[str, list[float]] = {}
    for outcome in found.outcomes:
        assert outcome.lost_seconds is not None
        lost.setdefault(outcome.fault.kind, []).append(outcome.lost_seconds)
    lines = ["", f"{'fault':<45} times  seconds until made up for"]
    lines += [
        f"{kind:<45} {len(took):5}  {statistics.median(took):6.1f}" for kind, took in sorted(lost.items())
    ]
    each = (found.seconds - found.useful) / max(1, len(found.outcomes))
    same = "differ from" if found.wrong else "are to the last bit"
    return [
        *lines,
        f"{len(found.outcomes)} faults in {found.seconds:.0f} s, of which {found.useful:.0f} s "
        f"({found.useful / found.seconds:.1%}) were useful; {each:.1f} s lost by each",
        f"with a fault every {_CLUSTER_SECONDS / 3600:.1f} h, {1 - each / _CLUSTER_SECONDS:.2%} would be",
        f"weights, optimizer state, losses, gradient norms and data {same} the undisturbed run's",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A run under faults, compared with an undisturbed one.")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new one, where runs and logs stay")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True)
        sys.exit(main(arguments.faults, arguments.seed, arguments.folder) > 0)
    with tempfile.TemporaryDirectory(prefix="trireme-chaos-") as name:
        sys.exit(main(arguments.faults, arguments.seed, Path(name)) > 0)
