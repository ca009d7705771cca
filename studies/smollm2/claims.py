#!/usr/bin/env python3
"""The headline claims of the original study, and of those whose training it looks into, beside what a study says.

    python studies/smollm2/claims.py out/smollm2

Each is computed twice on the study's first target: as the original scripts did, which wrote a rollout's gradients
bucket by bucket in the order drawn, their labels by position, and read the two line by line; and with each label on
its own gradient. What the second is worth is read from the analyses' summaries: intervals, nulls, and whether a
direction repeats between halves.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gradprobe.analysis.bucket import bucket_of  # noqa: E402
from gradprobe.analysis.inputs import open_dumps  # noqa: E402
from gradprobe.analysis.text import MISSING, estimate, share_estimate  # noqa: E402
from gradprobe.dump.format import Dump  # noqa: E402
from gradprobe.exp1.spectrum import participation_ratio  # noqa: E402
from gradprobe.exp2.direction import compare_groups  # noqa: E402
from gradprobe.exp3.signal import CLAIMED_SHARE  # noqa: E402
from gradprobe.exp3.summary import at  # noqa: E402

TOP = 4
DRAWS = 10
"""The original drew a bucket's positions in an order that no dump of ours has; so many such orders are tried."""
YES, NO, CANT_TELL = "borne out", "not borne out", "can't tell"
SHARED, APART = 0.7, 0.07
"""What the original gives: |cos| of 0.7 to 0.9 in the base model, at most 0.07 after RL."""
NEARLY_ALL = 0.8
"""A share of the gain, or a rank correlation, from which on it is nearly all, or the same order."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="OUT_ROOT of the study")
    study = parser.parse_args().study
    exp1, exp2, exp3 = (json.loads((study / "exp12_figures" / f"exp{i}_summary.json").read_text()) for i in (1, 2, 3))
    dumps = {tag: open_dumps({None: study / f"exp12_{tag}"})[None][0] for tag in exp1}
    rng = np.random.default_rng(0)
    wrong = {
        tag: [replace(d, bin=labels_by_line(d, rng.permutation(len(d.bin)))) for _ in range(DRAWS)]
        for tag, d in dumps.items()
    }
    then = {tag: [measured(dump) for dump in mislabelled] for tag, mislabelled in wrong.items()}
    now = {tag: measured(dump) for tag, dump in dumps.items()}
    moved = ", ".join(f"{np.mean(wrong[tag][0].bin != d.bin):.0%} of {tag}'s" for tag, d in dumps.items())
    print(f"Read line by line, {moved} labels are another bucket's; ranges are over {DRAWS} orders of drawing.\n")
    print("| claim | the original | computed as it did | each label on its gradient | what that is worth | |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [compression(exp1, then, now), *directions(exp1, then, now), *alignments(exp2, then, now)]
    for row in [*rows, top_tokens(exp3), *proxies(exp1)]:
        print("| " + " | ".join(row) + " |")


def labels_by_line(dump: Dump, drawn: np.ndarray) -> np.ndarray:
    """[n] the bucket that each gradient got where a rollout's labels stand by position, its gradients by bucket.

    Args:
        drawn: [n] numbers that say in which order the positions of a bucket were drawn; so their gradients stand.
    """
    by_position = np.lexsort((dump.pos, dump.sample_idx, dump.prompt))
    by_bucket = np.lexsort((drawn, dump.bin, dump.sample_idx, dump.prompt))
    labels = np.empty_like(dump.bin)
    labels[by_bucket] = dump.bin[by_position]
    return labels


def measured(dump: Dump) -> dict[str, Any]:
    """The top bucket's participation ratio, |cos| of its leading direction with the others', Exp 2's two means."""
    tops = [bucket_of(dump, index).leading_directions(1)[1][:, 0] for index in range(TOP + 1)]
    bucket = bucket_of(dump, TOP)
    found = compare_groups(bucket, dump.correct[bucket.rows])
    return {
        "pr": participation_ratio(bucket.energies()),
        "cosines": [abs(float(tops[TOP] @ other)) for other in tops[:TOP]],
        "mean": float(np.nanmean(found.cosines)),
        "control": float(np.nanmean(found.control)),
    }


def compression(exp1: dict[str, Any], then: dict[str, list[Any]], now: dict[str, Any]) -> list[str]:
    """RL leaves fewer directions in the bucket of highest entropy."""
    base, trained = (exp1[tag]["per_bucket"][str(TOP)] for tag in ("base", "trained"))
    at_equal_n = exp1["trained"]["compared_with"]["base"][str(TOP)]
    worth = [f"{spread(bucket['participation_ratio_ci95'], 0)} (ESS {bucket['ess']:.0f})" for bucket in (base, trained)]
    return [
        "fewer directions in the top bucket after RL",
        "PR 560, then 270",
        f"{extent(m['pr'] for m in then['base'])}, then {extent(m['pr'] for m in then['trained'])}",
        f"{now['base']['pr']:.1f}, then {now['trained']['pr']:.1f}",
        f"{' and '.join(worth)}; of unit rows at equal n {at_equal_n['ratio']:.2f} × {spread(at_equal_n['ci95'], 2)}",
        {"smaller": YES, "larger": NO}.get(at_equal_n["verdict"], CANT_TELL),
    ]


def directions(exp1: dict[str, Any], then: dict[str, list[Any]], now: dict[str, Any]) -> list[list[str]]:
    """Its leading direction is the other buckets' in the base model, and no longer after RL."""
    rows = []
    for tag, claim, original in [
        ("base", "its leading direction is the other buckets' too", "0.7 to 0.9"),
        ("trained", "and after RL it is not", "at most 0.07"),
    ]:
        repeats, null = exp1[tag]["cross_bucket_top1_repeats"], exp1[tag]["cross_bucket_null"]["top1_cosine"][TOP]
        told = [i for i in range(TOP) if repeats[i] == repeats[TOP] == "yes"]
        cosines = [exp1[tag]["cross_bucket_top1_cosine"][TOP][i] for i in told]
        holds = min(cosines) >= SHARED if tag == "base" and told else bool(told) and max(cosines) <= APART
        which = ", ".join(map(str, told)) if told else "none"
        limits = [null[i]["ci95"] for i in range(TOP) if null[i]]
        rows.append(
            [
                f"{tag}: {claim}",
                original,
                extent(c for m in then[tag] for c in m["cosines"]),
                ", ".join(f"{c:.2f}" for c in now[tag]["cosines"]) + " with buckets 0 to 3",
                f"between halves it repeats: {repeats[TOP]}; so do both for {which}; of shuffled labels "
                f"{min(lo for lo, _ in limits):.2f} to {max(hi for _, hi in limits):.2f}",
                (YES if holds else NO) if told else CANT_TELL,
            ]
        )
    return rows


def alignments(exp2: dict[str, Any], then: dict[str, list[Any]], now: dict[str, Any]) -> list[list[str]]:
    """Correct and incorrect rollouts push in unrelated directions there."""
    rows = []
    for tag in ("base", "trained"):
        found = exp2[tag]["alignment"]
        verdict = {"orthogonal": YES, "aligned": NO, "opposed": NO}.get(found["verdict"], CANT_TELL)
        rho = f"ρ {found['rho']:.2f} {spread(found['ci95'], 2)}" if found["ci95"] else "ρ has no interval"
        rows.append(
            [
                f"{tag}: correct and incorrect rollouts push in unrelated directions",
                "cosine near 0, control −0.010",
                f"{extent(m['mean'] for m in then[tag])}, control {extent(m['control'] for m in then[tag])}",
                f"{now[tag]['mean']:.3f}, control {now[tag]['control']:.3f}",
                f"{rho}, p {found['p_value']:.2g}, {found['n_prompts']} prompts: {found['verdict']}",
                verdict,
            ]
        )
    return rows


def top_tokens(exp3: dict[str, Any]) -> list[str]:
    """Wang et al.: RL on the 20% of the tokens with the highest entropy alone gains what RL on all of them does."""
    step = exp3["base"]["step"]
    shares = {rule: at(step["keep_top"][rule], CLAIMED_SHARE)["share"] for rule in ("entropy", "surprisal", "random")}
    low, high = shares["entropy"]["ci95"] or (0.0, 1.0)
    told = ", ".join(f"{rule} {share_estimate(one)}" for rule, one in shares.items())
    return [
        "base: the 20% of the tokens with the highest entropy carry nearly all of RL's gain",
        "trained on them alone, as good or better",
        MISSING,
        f"of the gain along its step {share_estimate(shares['entropy'])}",
        step["gain"]["reason"] or f"t {step['gain']['t']:.1f}; the top 20% by {told}",
        at_least(NEARLY_ALL, low, high),
    ]


def proxies(exp1: dict[str, Any]) -> list[list[str]]:
    """What rules that weigh or pick tokens by 1 − π take for granted, where the 20% have been picked by entropy."""
    rows = []
    for tag, found in exp1.items():
        of = {
            name: {group: groups[group]["rank_correlation"] for group in ("all", str(TOP))}
            for name, groups in found["proxies"].items()
            if groups is not None
        }
        one = next(iter(of.values()))
        others = [f"{name} {estimate(groups[str(TOP)])}" for name, groups in list(of.items())[1:]]
        rows.append(
            [
                f"{tag}: at tokens of high entropy 1 − π ranks as the gradient's norm does",
                "taken for granted by rules that weigh tokens by it",
                MISSING,
                f"rank correlation {estimate(one[str(TOP)])}, over all tokens {estimate(one['all'])}",
                f"at tokens of high entropy {', '.join(others)}",
                at_least(NEARLY_ALL, *(one[str(TOP)]["ci95"] or (-1.0, 1.0))),
            ]
        )
    return rows


def at_least(limit: float, low: float, high: float) -> str:
    """The verdict on a claim that a number is no smaller than a limit, by its interval."""
    return YES if low >= limit else NO if high < limit else CANT_TELL


def spread(interval: list[float], digits: int) -> str:
    """An interval in brackets."""
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def extent(values: Iterable[float]) -> str:
    """The least and the largest."""
    values = sorted(values)
    return f"{values[0]:.2f} to {values[-1]:.2f}"


if __name__ == "__main__":
    main()
