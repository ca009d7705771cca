"""Dumps with known content, written in the format of the original scripts, as people hold them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.analysis.bucket import Bucket

GOLDEN = Path(__file__).parent / "data" / "golden"
REPOSITORY = Path(__file__).parent.parent


def write_dump(
    path: Path,
    grads: np.ndarray,
    bucket: np.ndarray,
    *,
    prompt: np.ndarray | None = None,
    sample: np.ndarray | None = None,
    correct: np.ndarray | None = None,
    bins: int = 5,
    **manifest: Any,
) -> Path:
    """Write `grads`, [n, d], as a dump; what is not given is 0, and all rollouts are correct.

    Lines of `meta.jsonl` stand in reverse order, so that a reader that ignores `row` is found out.
    """
    n = len(grads)
    prompt = np.zeros(n, int) if prompt is None else prompt
    sample = np.zeros(n, int) if sample is None else sample
    correct = np.ones(n, bool) if correct is None else correct
    path.mkdir(parents=True)
    np.save(path / "grads.npy", np.asarray(grads, dtype=np.float32))
    lines = [
        {
            "row": row,
            "prompt_idx": int(prompt[row]),
            "sample_idx": int(sample[row]),
            "pos": row,
            "bin": int(bucket[row]),
            "entropy": (int(bucket[row]) + 0.5) / bins,
            "correct": bool(correct[row]),
        }
        for row in reversed(range(n))
    ]
    (path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "model_path": "models/planted",
        "target": "model.layers.1.mlp.down_proj.weight",
        "row_idx": 0,
        "row_dim": grads.shape[1],
        "num_prompts": len(set(prompt.tolist())),
        "num_samples_per_prompt": len(set(sample.tolist())),
        "num_rollouts": len(set(zip(prompt.tolist(), sample.tolist(), strict=True))),
        "num_positions": n,
        "entropy_edges": [i / bins for i in range(bins + 1)],
        "bins": bins,
        "pos_per_bin_per_rollout": 4,
        "seed": 0,
        "max_new_tokens": 64,
        "temperature": 1.0,
        "num_correct_rollouts": len({(int(p), int(s)) for p, s, c in zip(prompt, sample, correct, strict=True) if c}),
        "prompt_idxs": sorted(set(prompt.tolist())),
    }
    (path / "manifest.json").write_text(json.dumps(content | manifest))
    return path


def write_heavy_tailed_dump(path: Path, *, seed: int, n_prompts: int = 20, dim: int = 96, **manifest: Any) -> Path:
    """A dump of 8 rollouts per prompt and 4 positions per bucket, whose norms spread over orders of magnitude."""
    rng = np.random.default_rng(seed)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((n_prompts, 8, 5, 4)))
    right = rng.random((n_prompts, 8)) < rng.random((n_prompts, 1))
    correct = right[prompt, sample]
    shared = rng.standard_normal((n_prompts, dim))
    sign = np.where(correct, 1.0, -0.3)[:, None]
    directions = rng.standard_normal((len(prompt), dim)) + 0.6 * sign * shared[prompt]
    norms = np.exp(rng.standard_normal(len(prompt)) * (2.5 - 0.4 * bucket))
    return write_dump(
        path, directions * norms[:, None], bucket, prompt=prompt, sample=sample, correct=correct, **manifest
    )


def bucket_of(grads: np.ndarray, rows=None, prompt=None, rollout=None, **keywords) -> Bucket:
    """`grads[rows]`, or all, of `prompt` and `rollout`, [n_all]; every gradient its own where these are not given."""
    everyone = np.arange(len(grads))
    rows = everyone if rows is None else rows
    prompt, rollout = (everyone if codes is None else codes for codes in (prompt, rollout))
    return Bucket(grads, rows, prompt[rows], rollout[rows], **keywords)
