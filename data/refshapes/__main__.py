"""``python -m data.refshapes``: see :mod:`data.refshapes.generate`."""

import sys

from data.refshapes.generate import main
from lib.terminal import protect

if __name__ == "__main__":
    protect()
    sys.exit(main())
