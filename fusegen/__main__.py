"""``python -m fusegen``: the same as the command ``fusegen``."""

import sys

from fusegen.cli import main

if __name__ == "__main__":
    sys.exit(main())
