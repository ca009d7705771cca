"""Judge a dump's rollouts anew, without a GPU: its labels and counts change, its gradients don't.

    python -m gradprobe.verify DUMP [DUMP ...] --verifier boxed|numeric|math-verify|gym|module:function

Give a study's shards rather than their merged dump, and merge them again. Exit status 2: a dump has no rollouts, or the
verifier fails on one of them; that dump is left as it was.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .common.console import add_common_flags, printable, progress, script_main
from .common.errors import InputError, first_few, raise_if_any
from .common.files import locked
from .dump.records import iter_rollouts
from .dump.relabel import relabel, rollouts_of
from .problems.verifiers import BOXED, SECONDS_PER_ANSWER, RunningVerifier, Verifier, load_verifier


@script_main
def main(argv: list[str] | None = None) -> int:
    """Judge every dump named."""
    parser = argparse.ArgumentParser(
        prog="python -m gradprobe.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dumps", type=Path, nargs="+", metavar="DUMP", help="a dump, or a directory of several targets")
    parser.add_argument("--verifier", default=BOXED, help="as of the probe (default: %(default)s)")
    parser.add_argument("--verifier-seconds", type=float, default=SECONDS_PER_ANSWER, help="for one answer at most")
    add_common_flags(parser)
    arguments = parser.parse_args(argv)
    if not arguments.verifier_seconds > 0:
        raise InputError(f"`verifier_seconds` {arguments.verifier_seconds}: must be above 0")
    verifier = load_verifier(arguments.verifier)
    for path in arguments.dumps:
        with locked(path):
            print(printable(f"{path}: {judge_anew(path, verifier, arguments.verifier_seconds)}"))
    return 0


def judge_anew(path: Path, verifier: Verifier, seconds: float) -> str:
    """Give a dump the verifier's verdicts; what has changed, in words. Where the verifier fails nothing is written."""
    directories, file = rollouts_of(path)
    rollouts = list(iter_rollouts(file))
    judged, faults = [], []
    with RunningVerifier(verifier, seconds) as running:
        for r in progress(rollouts, "judging", len(rollouts), "rollouts"):
            verdict = running.judge(r.response, r.ground_truth)
            judged.append(replace(r, correct=verdict.correct))
            if verdict.correct is None:
                faults.append(f"failed on prompt {r.prompt_idx} sample {r.sample_idx}: {verdict.error}")
    raise_if_any(f"`verifier` {verifier.name}: {fault}" for fault in first_few(faults, "rollouts"))
    relabel(directories, file, judged, verifier.described(seconds))
    n_before, n_now = (sum(r.correct for r in verdicts) for verdicts in (rollouts, judged))
    changed = sum(before.correct != now.correct for before, now in zip(rollouts, judged, strict=True))
    n_rewards = sum(r.reward is not None for r in rollouts)
    left_out = f"; {n_rewards} rewards of who judged before are left out" if n_rewards else ""
    return f"{n_now} of {len(rollouts)} rollouts correct, before {n_before}; {changed} verdicts are others{left_out}"


if __name__ == "__main__":
    sys.exit(main())
