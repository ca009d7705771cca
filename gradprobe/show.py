"""Look at rollouts: tokens shaded by their entropy, those whose gradients were taken underlined.

    python -m gradprobe.show DUMP [--prompt P] [--sample S] [--num N]

Without a terminal, or with NO_COLOR, a token of the highest bucket stands in ‹ ›, a picked one in [ ].
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .common.console import add_common_flags, printable, script_main
from .common.errors import InputError
from .dump.format import Dump, find_rollouts, load_dump, target_directories
from .dump.pooled import buckets_of
from .dump.records import PromptKey, Rollout, iter_rollouts

SHADES = (None, 236, 238, 240, 94, 130, 166, 202)
"""Backgrounds among a terminal's 256 colours, from no entropy to much."""
UNDERLINE, RESET = "\x1b[4m", "\x1b[0m"


@dataclass(frozen=True)
class Token:
    """One response token as people see it.

    Attributes:
        text: escaped: what a model writes reaches no terminal raw.
        shade: from 0 to 1, its entropy in the highest bucket's lower edge, cut off at twice that.
        is_high: whether it is in the highest bucket.
        is_picked: whether its gradient is in the dump.
    """

    text: str
    entropy: float
    shade: float
    is_high: bool
    is_picked: bool


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


def head_of(rollout: Rollout) -> str:
    """A line about a rollout."""
    verdict = "correct" if rollout.correct else "incorrect"
    mean = float(np.mean(rollout.entropies)) if rollout.entropies else 0.0
    return printable(
        f"prompt {rollout.prompt_idx} sample {rollout.sample_idx} ('{rollout.problem_id}'): {verdict}, answer "
        f"'{rollout.ground_truth}', {len(rollout.response_ids)} tokens, mean entropy {mean:.2f} nats"
    )


def tokens_of(rollout: Rollout, dump: Dump) -> Iterator[Token]:
    """A rollout's tokens, in order.

    Raises:
        InputError: the dump is of a time when texts of tokens were not kept.
    """
    if not rollout.token_texts:
        raise InputError(
            f"{dump.path}: its rollouts.jsonl has no token_texts; probe it again by `rollouts` to add them"
        )
    edges = np.array(dump.manifest["entropy_edges"])
    own = (dump.sample_idx == rollout.sample_idx) & (dump.prompt == _code_of(dump, rollout.prompt_idx))
    picked = set() if dump.pos is None else set(dump.pos[own].tolist())
    buckets, high = buckets_of(rollout, edges), max(edges[-2], 1e-9)
    for k, (text, entropy) in enumerate(zip(rollout.token_texts, rollout.entropies, strict=True)):
        shade = min(entropy / (2 * high), 1.0)
        yield Token(visible(text), entropy, shade, bool(buckets[k] == dump.bins - 1), k in picked)


def _code_of(dump: Dump, key: PromptKey) -> int:
    return dump.prompt_keys.index(key) if key in dump.prompt_keys else -1


def visible(text: str) -> str:
    """A token's text with line ends kept and all other control characters escaped."""
    return "\n".join(map(printable, text.split("\n")))


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
