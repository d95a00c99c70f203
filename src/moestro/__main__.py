"""`python -m moestro`, where the command `moestro` is not on the path."""

from .cli.main import main

if __name__ == "__main__":
    main()
