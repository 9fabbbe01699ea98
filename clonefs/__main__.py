"""`python -m clonefs` is the command `clonefs`: for a checkout, where no script is installed."""

from clonefs.cli import main

if __name__ == "__main__":
    main(prog_name="clonefs")
