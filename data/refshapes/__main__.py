"""``python -m data.refshapes``: see :mod:`data.refshapes.generate`."""

import sys

from data.refshapes.generate import main

if __name__ == "__main__":
    sys.exit(main())
