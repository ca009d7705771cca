"""Exit non-zero unless a small study of the demo pair has all its files and numbers inside two-sided bands.

    python tests/check_small_study.py OUT_ROOT      (24 prompts × 8 rollouts of each model, see .ci/run)

The bands hold what three seeds of prompts gave, along the step 40 draws of 24 prompts out of 128, with about four
standard deviations to either side. Pooled gradients are looked at where there are some (EXP3=1).
"""

import json
import sys
from pathlib import Path

FIGURES = """exp1_cumulative_energy exp1_cross_bucket_cosine exp1_norms exp1_headline exp1_bin4_energy
    exp2_direction_cosine_hist exp2_alignment exp2_headline exp3_step step_weights""".split()
FIGURES_OF_POOLED = ("exp3_headline", "exp3_keep_top")
N_EXP3_BINS = 20
SHARES = ("share_of_tokens", "signal_share", "signal_share_within_prompts", "noise_share")
"""Of each bucket of Exp 3: parts of a whole."""
SHARES_OF_STEP = ("share_of_tokens", "share", "noise_share")
NORM_OF_STEP = 2.90651
"""Of all parameters of the demo's pair, whatever was sampled."""
BANDS = {
    "base accuracy": (0.28, 0.75),
    "trained accuracy": (0.50, 0.97),
    "base tokens per response": (40, 49),
    "trained tokens per response": (40, 49),
    "base participation ratio, bucket 4": (1.5, 30),
    "trained participation ratio, bucket 4": (1.5, 30),
    "base rank95, bucket 4": (6, 50),
    "trained rank95, bucket 4": (6, 50),
    "base mean cosine": (-0.4, 0.25),
    "trained mean cosine": (-0.55, 0.3),
    "base control": (-0.15, 0.3),
    "trained control": (-0.2, 0.5),
    "base t along the step": (0.7, 8),
    "trained t along the step": (-4.2, 3),
    "base linearity": (0.45, 0.95),
    "trained linearity": (0.4, 0.85),
    "base slope": (0.65, 1.3),
    "trained slope": (0.4, 0.85),
}


def numbers_of(root: Path) -> dict[str, float]:
    """The numbers that have a band."""
    exp1, exp2, exp3 = (json.loads((root / "exp12_figures" / f"exp{i}_summary.json").read_text()) for i in (1, 2, 3))
    numbers = {}
    for tag in ("base", "trained"):
        manifest = json.loads((root / f"exp12_{tag}" / "manifest.json").read_text())
        assert manifest["num_rollouts"] == 24 * 8
        assert 0.9 * 24 * 8 * 20 < manifest["num_positions"] <= 24 * 8 * 20
        numbers[f"{tag} accuracy"] = manifest["num_correct_rollouts"] / manifest["num_rollouts"]
        numbers[f"{tag} tokens per response"] = manifest["num_response_tokens"] / manifest["num_rollouts"]
        top = exp1[tag]["per_bucket"]["4"]
        numbers[f"{tag} participation ratio, bucket 4"] = top["participation_ratio"]
        numbers[f"{tag} rank95, bucket 4"] = top["rank95"]
        numbers[f"{tag} mean cosine"] = exp2[tag]["correct_vs_incorrect"]["mean"]
        numbers[f"{tag} control"] = exp2[tag]["control_within_group"]["mean"]
        step = exp3[tag]["step"]
        numbers[f"{tag} t along the step"] = step["gain"]["t"]
        numbers[f"{tag} linearity"], numbers[f"{tag} slope"] = step["linearity"].values()
    return numbers


def check_step(root: Path) -> None:
    """Every token of the study's rollouts along one and the same step; its ends and its gain as measured."""
    summary = json.loads((root / "exp12_figures" / "exp3_summary.json").read_text())
    sampled = {tag: json.loads((root / f"exp12_{tag}" / "manifest.json").read_text()) for tag in summary}
    correct = {tag: one["num_correct_rollouts"] / one["num_rollouts"] for tag, one in sampled.items()}
    weights = json.loads((root / "exp12_figures" / "step_summary.json").read_text())
    assert (weights["from"], weights["to"]) == ("base", "trained")
    assert not any(one["is_left_out"] for one in weights["weights"].values())
    for tag, end in (("base", "from"), ("trained", "to")):
        step = summary[tag]["step"]
        assert (step["from"], step["to"], step["at"]) == ("base", "trained", end)
        assert abs(sampled[tag]["step"]["norm"] / NORM_OF_STEP - 1) < 1e-4, tag
        assert step["n_rollouts"] == sampled[tag]["num_rollouts"]
        assert abs(step["measured_gain"] - (correct["trained"] - correct["base"])) < 1e-9
        for line in (root / f"exp12_{tag}" / "rollouts.jsonl").read_text().splitlines():
            rollout = json.loads(line)
            assert len(rollout["step"]) == len(rollout["step_logprobs"]) == len(rollout["response_ids"]), tag
        for name in SHARES_OF_STEP:
            add_up(f"{tag} along the step, {name}", step["per_bucket"], name, len(summary[tag]["edges"]) - 1)
        for rule, curve in step["keep_top"].items():
            last = curve[-1]["share"]["value"]
            assert last is None or abs(last - 1) < 1e-6, (tag, rule)


def check_pooled(root: Path) -> None:
    """Pooled dumps of all tokens of the very same rollouts, and shares that add up to 1 where they can be told."""
    summary = json.loads((root / "exp12_figures" / "exp3_summary.json").read_text())
    assert list(summary) == ["base", "trained"]
    for tag, numbers in summary.items():
        sampled, pooled = (
            json.loads((root / f"{part}_{tag}" / "manifest.json").read_text()) for part in ("exp12", "exp3")
        )
        assert (pooled["pooling"], pooled["bins"], pooled["row_dim"]) == ("bucket", N_EXP3_BINS, 16 * 16)
        same = ("num_rollouts", "num_prompts", "num_correct_rollouts", "num_response_tokens", "prompt_idxs", "dataset")
        assert {key: pooled[key] for key in (*same, "step")} == {key: sampled[key] for key in (*same, "step")}
        lines = (root / f"exp3_{tag}" / "meta.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["n_tokens"] for line in lines) == sampled["num_response_tokens"]
        assert (numbers["bins"], numbers["n_rollouts"]) == (N_EXP3_BINS, sampled["num_rollouts"])
        for name in SHARES:
            add_up(f"{tag} {name}", numbers["per_bucket"], name, N_EXP3_BINS)


def add_up(what: str, buckets: dict[str, dict], name: str, n_buckets: int) -> None:
    """The parts of every bucket are those of a whole, or none can be told."""
    shares = [bucket[name] for bucket in buckets.values()]
    values = [share["value"] if isinstance(share, dict) else share for share in shares]
    known = [value for value in values if value is not None]
    print(f"{what}: {f'{sum(known):.9f} in all' if known else 'not told'}")
    assert len(values) == n_buckets
    assert not known or (len(known) == n_buckets and abs(sum(known) - 1) < 1e-6), (what, values)


def main(root: Path) -> int:
    """Check files and bands."""
    is_pooled = (root / "exp3_base").exists()
    for name in (*FIGURES, *(FIGURES_OF_POOLED if is_pooled else ())):
        content = (root / "exp12_figures" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG"), name
        assert len(content) > 20_000, name
    assert (root / "exp12_figures" / "report.html").stat().st_size > 500_000
    for name in ("exp1.txt", "exp2.txt", "exp3.txt", "step.txt", "plot.txt"):
        assert (root / "exp12_figures" / name).stat().st_size > 200, name
    check_step(root)
    if is_pooled:
        check_pooled(root)
    outside = 0
    for name, value in numbers_of(root).items():
        low, high = BANDS[name]
        inside = low <= value <= high
        outside += not inside
        print(f"{'' if inside else 'OUTSIDE '}{name}: {value:.3f} in [{low}, {high}]")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
