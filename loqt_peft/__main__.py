"""`python -m loqt_peft`: the same as `loqt`."""

import sys

from ._moved import moved_names
from .cli.main import main


__getattr__ = moved_names(__name__)

if __name__ == "__main__":
    sys.exit(main())
