"""`python -m gradprobe.check`: see `gradprobe.dump.check`."""

import sys

from .dump.check import main

if __name__ == "__main__":
    sys.exit(main())
