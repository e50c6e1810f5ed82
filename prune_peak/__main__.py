"""`python -m prune_peak` is `prune-peak`."""

from .cli.main import main

if __name__ == "__main__":
    main()
