"""``python -m mergebench``."""

from mergebench.cli.start import main

if __name__ == "__main__":
    main()
