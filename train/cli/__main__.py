"""`python -m train.cli`: the `trireme` command by the interpreter that is running."""

from train.cli import main

if __name__ == "__main__":
    main()
