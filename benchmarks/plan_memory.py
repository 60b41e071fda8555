"""Memory that the planner predicts against what steps on this CPU take, as a table for docs/planner.md.

python -m benchmarks.plan_memory
"""

from parallel.planner.hardware import load_device
from parallel.planner.memory import predict_memory
from tests.parallel.planner.cases import arranged, run_of
from tests.parallel.planner.measured import measured_peak
from tests.parallel.planner.test_memory import PEAKS
from tests.parallel.planner.test_zero import PEAKS as ZERO_PEAKS


def main() -> None:
    """Print the table."""
    cpu = load_device("cpu")
    print("| | predicted, MB | measured, MB | |")
    print("|---|---|---|---|")
    cases = [
        (name, run_of(model, precision, sequences), arranged(micro, again, **sizes))
        for name, model, precision, sequences, micro, again, sizes in PEAKS
    ]
    cases += [
        (f"DeepSpeed, {name}", run_of(model, precision, sequences), arrangement)
        for name, model, precision, sequences, arrangement in ZERO_PEAKS
    ]
    for name, run, arrangement in cases:
        predicted, measured = predict_memory(run, arrangement, cpu).total, measured_peak(run, arrangement)
        print(
            f"| {name} | {predicted / 1e6:.1f} | {measured / 1e6:.1f} | {predicted / measured - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
