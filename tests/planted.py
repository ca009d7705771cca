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


def write_pooled_dump(
    path: Path,
    sums: np.ndarray,
    correct: np.ndarray,
    n_tokens: np.ndarray,
    *,
    tail_mass: float = 0.3,
    excess: float = 0.0,
    with_rollouts: bool = True,
    reward: np.ndarray | None = None,
    **manifest: Any,
) -> Path:
    """Write rollouts' sums of gradients by bucket as a pooled dump of a model's own rollouts.

    Args:
        path: of the dump.
        sums: [P, R, B, d]; where `n_tokens` is 0 there is no row.
        correct: [P, R] bool.
        n_tokens: [P, R, B].
        tail_mass: of every token.
        excess: log π(y) + H in the mean, nats; other than 0, rollouts are off-policy.
        with_rollouts: whether `rollouts.jsonl` is written.
        reward: [P, R].
        manifest: further keys.
    """
    path.mkdir(parents=True)
    n_prompts, n_rollouts, bins, dim = sums.shape
    rng = np.random.default_rng(0)
    places, lines, rollouts = [], [], []
    for p, r in np.ndindex(n_prompts, n_rollouts):
        counts = n_tokens[p, r]
        own = {"prompt_idx": p, "sample_idx": r, "correct": bool(correct[p, r])}
        own |= {} if reward is None else {"reward": float(reward[p, r])}
        entropies = np.repeat((np.arange(bins) + 0.5) / bins, counts)
        logprobs = rng.choice([-0.4, 0.4], len(entropies)) - entropies + excess
        for bucket in np.flatnonzero(counts).tolist():
            of_row = {"row": len(lines), "bin": bucket, "n_tokens": int(counts[bucket]), "logprob": -0.5}
            of_row |= {"n_response_tokens": int(counts.sum()), "entropy": (bucket + 0.5) / bins}
            lines.append(own | of_row | {"rare": tail_mass * int(counts[bucket])})
            places.append((p, r, bucket))
        numbers = {"entropies": entropies.tolist(), "logprobs": logprobs.tolist()}
        numbers |= {"tail_mass": [tail_mass] * len(entropies), "response_ids": [1] * len(entropies)}
        texts = {"problem_id": str(p), "response": "", "ground_truth": ""}
        rollouts.append(own | numbers | texts | {"prompt_ids": [1 + own["prompt_idx"]]})
    grads = np.array([sums[place] for place in places], np.float32).reshape(-1, dim)
    np.save(path / "grads.npy", grads)
    (path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if with_rollouts:
        (path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    content = {
        "model_path": "models/planted",
        "model_identity": "planted",
        "target": "model.layers.1.mlp.down_proj.weight",
        "row_idx": None,
        "projection": {"rows": 4, "cols": dim // 4, "seed": 0, "weights": []},
        "pooling": "bucket",
        "bucket_by": "entropy",
        "row_dim": dim,
        "num_prompts": n_prompts,
        "num_samples_per_prompt": n_rollouts,
        "num_rollouts": n_prompts * n_rollouts,
        "num_positions": len(grads),
        "entropy_edges": [i / bins for i in range(bins + 1)],
        "entropy_edges_over": "response_tokens",
        "bins": bins,
        "seed": 0,
        "max_new_tokens": 64,
        "temperature": 1.0,
        "sampling": {"distribution": "full softmax", "temperature": 1.0},
        "num_correct_rollouts": int(correct.sum()),
        "num_response_tokens": int(n_tokens.sum()),
        "format_version": 1,
    }
    (path / "manifest.json").write_text(json.dumps(content | manifest))
    return path


def write_planted_signal(
    path: Path,
    signal: np.ndarray,
    *,
    angle: np.ndarray | float = 0.0,
    seed: int = 0,
    n_prompts: int = 60,
    n_rollouts: int = 8,
    dim: int = 32,
    **others: Any,
) -> Path:
    """A pooled dump in which correct rollouts add a length of `signal[b]` to bucket b, over noise of length 1 in each.

    What is added points `angle[b]` away from the first axis. A rollout has 1 to 6 tokens a bucket.
    """
    rng = np.random.default_rng(seed)
    shape = (n_prompts, n_rollouts, len(signal))
    correct = rng.random(shape[:2]) < rng.uniform(0.2, 0.8, (n_prompts, 1))
    added = np.zeros((len(signal), dim))
    added[:, 0], added[:, 1] = signal * np.cos(angle), signal * np.sin(angle)
    sums = rng.standard_normal((*shape, dim)) / np.sqrt(dim)
    sums += (correct - 0.5)[:, :, None, None] * added
    return write_pooled_dump(path, sums, correct, rng.integers(1, 7, shape), **others)


def plant_step(
    dump: Path, strength: np.ndarray, *, at: str = "from", names: tuple[str, str] = ("base", "trained")
) -> Path:
    """Lets a dump's rollouts tell of a step along which tokens of bucket b gain by `strength[b]` where correct.

    Args:
        dump: with rollouts.
        strength: [bins].
        at: the end of the step at which the dump's model stands.
        names: of the step's ends, which are their identities, too.
    """
    rng, bins = np.random.default_rng(0), len(strength)
    lines = []
    for line in (dump / "rollouts.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        bucket = (np.array(rollout["entropies"]) * bins).astype(int)
        d = (rollout["correct"] - 0.5) * strength[bucket] + 0.05 * rng.standard_normal(len(bucket))
        shift = 0.5 * d + 0.01 * rng.standard_normal(len(bucket))
        other = np.array(rollout["logprobs"]) + (shift if at == "from" else -shift)
        words = [f" word{index}" for index in bucket.tolist()]
        lines.append(rollout | {"step": d.tolist(), "step_logprobs": other.tolist(), "token_texts": words})
    (dump / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((dump / "manifest.json").read_text())
    ends = dict(zip(("from", "to"), names, strict=True))
    step = {**{end: f"models/{name}" for end, name in ends.items()}, "identities": ends, "parameters": 100}
    step |= {"logprobs_of": {"from": "to", "to": "from"}[at], "unchanged": 0, "unchanged_tensors": [], "norm": 1.0}
    (dump / "manifest.json").write_text(json.dumps(manifest | {"step": step, "model_identity": ends[at]}))
    return dump


def write_dump_along_step(
    path: Path, strength: np.ndarray, *, seed: int = 0, at: str = "from", **manifest: Any
) -> Path:
    """A dump of one token per rollout and bucket, with rollouts that tell of a step (`plant_step`)."""
    pooled = write_planted_signal(path, 0 * strength, seed=seed, **manifest)
    lines = [json.loads(line) for line in (pooled / "meta.jsonl").read_text().splitlines()]
    own = {"row", "prompt_idx", "sample_idx", "bin", "entropy", "correct", "logprob"}
    first = {(line["prompt_idx"], line["sample_idx"]): 0 for line in lines}
    for line in lines:
        key = line["prompt_idx"], line["sample_idx"]
        n_tokens, line["pos"] = line["n_tokens"], first[key]
        first[key] += n_tokens
    tokens = [{key: line[key] for key in (*own, "pos")} | {"token_id": 1} for line in lines]
    (pooled / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tokens))
    content = json.loads((pooled / "manifest.json").read_text()) | {"row_idx": 0, "pos_per_bin_per_rollout": 1}
    for key in ("pooling", "bucket_by", "projection"):
        del content[key]
    (pooled / "manifest.json").write_text(json.dumps(content))
    return plant_step(pooled, strength, at=at)
