"""``python -m smalto`` is the command ``smalto``."""

from smalto.cli import main

if __name__ == "__main__":
    main()
