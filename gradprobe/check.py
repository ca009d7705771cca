"""Is a dump sound?

    python -m gradprobe.check DUMP [DUMP ...]

Exit status 0: sound. 2: all problems of all dumps are named on stderr, one a line.
"""

import argparse
import sys
from pathlib import Path

from .common.console import add_common_flags, log, printable, script_main
from .dump.consistency import problems_of


@script_main
def main(argv: list[str] | None = None) -> int:
    """Check every dump named what is wrong with each."""
    parser = argparse.ArgumentParser(
        prog="python -m gradprobe.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dumps", type=Path, nargs="+", metavar="DUMP", help="a dump's directory, or of several targets'"
    )
    add_common_flags(parser)
    status = 0
    for path in parser.parse_args(argv).dumps:
        problems, notes = problems_of(path)
        for note in notes:
            log.info(f"note: {note}")
        for problem in problems:
            log.error(problem)
        status = 2 if problems else status
        if not problems:
            print(printable(f"{path}: sound"))
    return status


if __name__ == "__main__":
    sys.exit(main())
