"""What theory fixes: unsampled means get no verdict, on-policy rho has a reference, sums of real rollouts oppose."""

import json

import numpy as np
import pytest

import analyze_exp2_direction
import probe_grad_vectors
from gradprobe.analysis.bucket import Bucket
from gradprobe.dump.on_policy import MIN_RARE_TOKENS
from gradprobe.exp2.direction import ALIGNED, UNSAMPLED
from gradprobe.exp2.measure import Exp2Settings, directions_of_bucket

SETTINGS = Exp2Settings(bootstrap=100, permutations=99)
N_PROMPTS, N_ROLLOUTS, N_TOKENS, DIM = 30, 8, 4, 200


def aligned_bucket(rng: np.random.Generator) -> tuple[Bucket, np.ndarray]:
    """Tokens whose correct and incorrect rollouts share a direction, as where rare tokens did not come up."""
    prompt, rollout, _ = (axis.ravel() for axis in np.indices((N_PROMPTS, N_ROLLOUTS, N_TOKENS)))
    shared = rng.standard_normal((N_PROMPTS, DIM))
    grads = (shared[prompt] + rng.standard_normal((len(prompt), DIM))).astype(np.float32)
    bucket = Bucket(grads, np.arange(len(prompt)), prompt, prompt * N_ROLLOUTS + rollout)
    return bucket, rollout % 2 == 0


@pytest.mark.parametrize(("tail", "verdict"), [(None, ALIGNED), (0.5, ALIGNED), (1e-4, UNSAMPLED)])
def test_no_verdict_on_means_whose_rare_tokens_were_not_to_be_expected(tail, verdict):
    bucket, correct = aligned_bucket(np.random.default_rng(0))
    tails = None if tail is None else np.full(bucket.n, tail)
    found = directions_of_bucket(bucket, correct, SETTINGS, tails)
    assert found.alignment.verdict == verdict
    assert (found.cancellation.verdict == UNSAMPLED) == (verdict == UNSAMPLED)
    assert found.alignment.ci95[0] > 0  # the interval knows nothing of it
    assert found.n_rare is None if tail is None else found.n_rare == pytest.approx(tail * bucket.n / 2)


def test_the_less_sampled_of_both_kinds_decides():
    bucket, correct = aligned_bucket(np.random.default_rng(1))
    tails = np.where(correct, 1.0, 0.9 * MIN_RARE_TOKENS / (~correct).sum())
    assert directions_of_bucket(bucket, correct, SETTINGS, tails).alignment.verdict == UNSAMPLED


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """Exp 2 of the demo's base model: tokens, sums, sums by surprisal, and the trained model on the same tokens."""
    root = tmp_path_factory.mktemp("law")
    size = ["--num-prompts", 12, "--num-samples", 8, "--max-new-tokens", 96, "--device", "cpu", "--layer", 6]
    pool = ["--rollouts", root / "tokens", "--pool", "bucket", "--device", "cpu", "--layer", 6]
    for name, model, flags in (
        ("tokens", "base", size),
        ("sums", "base", pool),
        ("surprisal", "base", [*pool, "--bucket-by", "surprisal"]),
        ("trained", "trained", pool),
    ):
        command = ["--model-path", f"demo/{model}", "--output-dir", root / name, *flags]
        assert probe_grad_vectors.main(list(map(str, command))) == 0
    tags = [f"{name}={root / name}" for name in ("tokens", "sums", "surprisal", "trained")]
    assert analyze_exp2_direction.main(["--output-dir", str(root / "out"), *tags]) == 0
    return json.loads((root / "out" / "exp2_summary.json").read_text())


@pytest.mark.slow
def test_the_summary_says_what_is_fixed(summaries):
    assert summaries["tokens"]["reference"] == summaries["sums"]["reference"] == -1
    assert summaries["surprisal"]["reference"] is None  # its buckets look at the token drawn
    assert all(found["on_policy"] is None for found in summaries["surprisal"]["by_bucket"].values())
    for tag in ("tokens", "sums"):
        assert summaries[tag]["on_policy_all_tokens"]["verdict"] == "on-policy"
        assert abs(summaries[tag]["on_policy_all_tokens"]["z"]) < 4
        assert summaries[tag]["by_bucket"]["0"]["alignment"]["verdict"] == UNSAMPLED
    assert summaries["sums"]["by_bucket"]["0"]["rho_over_sums"] == {"value": None, "ci95": None}
    assert summaries["tokens"]["rho_over_sums"] is None
    assert set(summaries["sums"]["rho_over_sums"]) == {"value", "ci95"}


@pytest.mark.slow
def test_another_models_tokens_are_off_policy_and_have_no_reference(summaries):
    assert summaries["trained"]["on_policy_all_tokens"]["verdict"] == "off-policy"
    assert summaries["trained"]["reference"] is None
