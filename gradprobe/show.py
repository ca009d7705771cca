"""Look at rollouts: tokens shaded by their entropy, those whose gradients were taken underlined.

    python -m gradprobe.show DUMP [--prompt P] [--sample S] [--num N]

Without a terminal, or with NO_COLOR, a token of the highest bucket stands in ‹ ›, a picked one in [ ].
"""

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

from .common.console import add_common_flags, script_main
from .common.errors import InputError
from .dump.consistency import load_dump
from .dump.format import find_rollouts, target_directories
from .dump.records import PromptKey, iter_rollouts
from .figures.tokens import Token, head_of, tokens_of

SHADES = (None, 236, 238, 240, 94, 130, 166, 202)
"""Backgrounds among a terminal's 256 colours, from no entropy to much."""
UNDERLINE, RESET = "\x1b[4m", "\x1b[0m"


@script_main
def main(argv: list[str] | None = None) -> int:
    """Print rollouts."""
    parser = argparse.ArgumentParser(
        prog="python -m gradprobe.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="a dump, or a directory of several targets")
    parser.add_argument("--prompt", type=int, metavar="P", help="prompt_idx (default: any)")
    parser.add_argument("--sample", type=int, metavar="S", help="sample_idx (default: any)")
    parser.add_argument("--num", type=int, default=4, metavar="N", help="rollouts at most (default: %(default)s)")
    add_common_flags(parser)
    arguments = parser.parse_args(argv)
    dump = load_dump(target_directories(arguments.dump)[0])
    file = find_rollouts(dump.path)
    if file is None:
        raise InputError(f"{arguments.dump}: no rollouts.jsonl in it, so there is no text to show")
    asked = ((arguments.prompt, "prompt_idx"), (arguments.sample, "sample_idx"))
    found = (r for r in iter_rollouts(file) if all(n is None or _index(getattr(r, key)) == n for n, key in asked))
    shown = list(islice(found, max(arguments.num, 0)))
    if not shown:
        raise InputError(f"{file}: no such rollout; prompts are {', '.join(map(str, dump.prompt_keys[:8]))} and so on")
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for rollout in shown:
        print(head_of(rollout))
        print("".join(map(coloured if is_coloured else marked, tokens_of(rollout, dump))) + "\n")
    return 0


def _index(key: PromptKey) -> int:
    return key[-1] if isinstance(key, tuple) else key


def coloured(token: Token) -> str:
    """For a terminal of 256 colours."""
    colour = SHADES[round(token.shade * (len(SHADES) - 1))]
    style = ("" if colour is None else f"\x1b[48;5;{colour}m") + (UNDERLINE if token.is_picked else "")
    return "\n".join(f"{style}{part}{RESET}" if style and part else part for part in token.text.split("\n"))


def marked(token: Token) -> str:
    """For a file."""
    text = f"‹{token.text}›" if token.is_high else token.text
    return f"[{text}]" if token.is_picked else text


if __name__ == "__main__":
    sys.exit(main())
