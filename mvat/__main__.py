"""`python -m mvat` is the command `mvat`."""

import sys

from mvat.cli import main

if __name__ == "__main__":
    sys.exit(main())
