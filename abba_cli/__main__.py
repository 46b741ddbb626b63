"""`python -m abba_cli` is `abba`."""

from abba_cli.cli import main

if __name__ == "__main__":
    main()
