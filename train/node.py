"""What each node of a job does before the ranks start there: `python -m train.node CONFIG alone|together FOLDER`."""

import sys
from pathlib import Path

from slurm.health import find_faults, node_name, write_report
from train.config_file import load_config
from train.errors import told_in_one_line
from train.run_folder import folder_of


def main(config: str, stage: str, folder: str) -> None:
    """Clean up and check this node, alone, or whether it works together with the others, and write a report."""
    with told_in_one_line():
        settings = load_config(config).config
    if stage == "alone":
        from data.shared_memory import clean_stale_shared_memory

        clean_stale_shared_memory()
        wrong = find_faults(
            folder_of(settings).path, settings.slurm.health, settings.slurm.gpus_per_node or 0
        )
        write_report(Path(folder), "; ".join(wrong) or "ok")
        return
    write_report(Path(folder), "ok, waits for the others")
    from slurm.fabric import meet

    health = settings.slurm.health
    met = meet(node_name(), health.timeout_seconds, health.clock_skew_seconds)
    report = (
        f"ok, {met.together / 1e9:.2f} GB/s among all nodes, {met.to_neighbour / 1e9:.2f} with a neighbour"
    )
    if met.to_neighbour < health.bandwidth_gb * 1e9:
        report = (
            f"{met.to_neighbour / 1e9:.2f} GB/s with its better neighbour, less than "
            f"slurm.health.bandwidth_gb={health.bandwidth_gb:g}"
        )
    if node_name() in met.skewed:
        report = f"its clock is {met.skewed[node_name()]:+.1f} s off the others'"
    write_report(Path(folder), report)


if __name__ == "__main__":
    main(*sys.argv[1:])
