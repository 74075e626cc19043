"""`python -m m2l`: the `m2l` command."""

from m2l.cli import main

if __name__ == "__main__":
    main()
