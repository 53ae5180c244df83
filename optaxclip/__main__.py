"""``python -m optaxclip``: the command line of :mod:`optaxclip.audit`."""

import sys

from optaxclip.audit._cli import main

if __name__ == "__main__":
    sys.exit(main())
