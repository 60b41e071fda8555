"""The worker: `torchrun ... -m train CONFIG [key.path=value ...]`, and what `trireme train` starts."""

import sys

from train.errors import told_in_one_line


def main(arguments: list[str]) -> None:
    """Train in this process, as one of the launcher's group or alone."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: torchrun ... -m train CONFIG [key.path=value ...]", file=sys.stderr)
        sys.exit(2)
    with told_in_one_line():
        from parallel.processes import end_process
        from train.config_file import load_config
        from train.worker import work

        work(load_config(arguments[0], arguments[1:]))
        end_process()


if __name__ == "__main__":
    main(sys.argv[1:])
