"""`python -m loqt_peft`: the same as `loqt`."""

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
