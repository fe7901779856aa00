"""Run the command line by ``python -m blocksnap``."""

from blocksnap.cli.main import main

if __name__ == "__main__":
    main()
