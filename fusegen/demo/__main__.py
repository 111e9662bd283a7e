"""Run the demo: ``python -m fusegen.demo``."""

from __future__ import annotations

import sys
import time

from fusegen.demo import emoji, emoji_gan, pycode
from fusegen.demo.beside import table


def main() -> int:
    """Every model in turn, then a table; 1 where an output is not eager PyTorch's."""
    start = time.perf_counter()
    found = [one for part in (emoji, emoji_gan, pycode) for one in part.show()]
    print(f"== in {time.perf_counter() - start:.0f} s, on this machine alone", *table(found), sep="\n")
    return 0 if all(one.agrees for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
