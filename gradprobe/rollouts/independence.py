"""Do rollouts of different prompts share their noise? A sampler with one seed for all requests makes them.

Independent rollouts agree in as many tokens with another prompt's rollouts of the same sample number as with those of
other numbers: a number is a mere name. So numbers are shuffled within each prompt, and agreement at equal numbers is
held against what shuffled ones give.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from ..dump.records import Rollout

MOST_STEPS = 32
"""Later tokens say little: by then texts have gone their own ways."""
MOST_PROMPTS, MOST_SAMPLES = 256, 32
SHUFFLES = 200
LARGEST_Z = 4.0


@dataclass(frozen=True)
class SharedNoise:
    """How often rollouts of two prompts have the same token at the same step: at the `same` sample number, at others.

    `z` is `same` against shuffled numbers, in standard deviations of these. None is what can't be told.
    """

    same: float | None
    other: float | None
    z: float | None

    @property
    def is_shared(self) -> bool:
        """Whether agreement at equal numbers is no chance."""
        return self.z is not None and self.z > LARGEST_Z

    def as_dict(self) -> dict[str, float | bool | None]:
        """For the manifest."""
        return {**asdict(self), "is_shared": self.is_shared}

    def line(self) -> str:
        """For a person."""
        if self.z is None:
            return "whether rollouts of different prompts are independent can't be told: it takes two with two each"
        agree = f"the same token at a step in {self.same:.3f} at the same sample number, in {self.other:.3f} at another"
        if not self.is_shared:
            return f"rollouts of different prompts look independent: {agree} (z {self.z:+.1f})"
        return (
            f"rollouts of different prompts share their noise: {agree} (z {self.z:.1f}); was there one seed for all? "
            "Intervals take them for independent: sample again, with a seed for each prompt and sample, or with none"
        )


def shared_noise(rollouts: Iterable[Rollout]) -> SharedNoise:
    """Compare rollouts of different prompts at equal and at other sample numbers."""
    tokens = _table(rollouts)
    if tokens.shape[0] < 2 or ((tokens[:, :, 0] >= 0).sum(axis=1) > 1).sum() < 2:
        return SharedNoise(None, None, None)
    rng = np.random.default_rng(0)
    same, n_same = _agreements(tokens)
    numbers = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    renumbered = (rng.permuted(numbers, axis=1)[:, :, None] for _ in range(SHUFFLES))
    shuffled = [np.divide(*_agreements(np.take_along_axis(tokens, of, axis=1))) for of in renumbered]
    of_all, n_all = _agreements(tokens.reshape(1, -1, tokens.shape[2]).swapaxes(0, 1))
    within = [_agreements(of_prompt[:, None]) for of_prompt in tokens]
    other = of_all - same - sum(agreeing for agreeing, _ in within)
    n_other = n_all - n_same - sum(n for _, n in within)
    spread = float(np.std(shuffled))
    z = float((same / n_same - np.mean(shuffled)) / spread) if n_same and spread > 0 else None
    return SharedNoise(same / n_same if n_same else None, other / n_other if n_other else None, z)


def _table(rollouts: Iterable[Rollout]) -> np.ndarray:
    """[prompts, sample numbers, steps] int64 token ids, -1 where there is none."""
    kept = [r for r in rollouts if r.response_ids]
    prompts = {key: i for i, key in enumerate(list(dict.fromkeys(r.prompt_idx for r in kept))[:MOST_PROMPTS])}
    samples = {key: i for i, key in enumerate(sorted({r.sample_idx for r in kept})[:MOST_SAMPLES])}
    table = np.full((len(prompts), max(len(samples), 1), MOST_STEPS), -1, np.int64)
    for r in kept:
        if r.prompt_idx in prompts and r.sample_idx in samples:
            ids = r.response_ids[:MOST_STEPS]
            table[prompts[r.prompt_idx], samples[r.sample_idx], : len(ids)] = ids
    return table


def _agreements(tokens: np.ndarray) -> tuple[float, float]:
    """Pairs along the first axis with the same token at a place of the other axes, and pairs with any token there."""
    place = np.broadcast_to(np.arange(tokens[0].size).reshape(tokens[0].shape), tokens.shape)
    there = tokens >= 0
    n_there = there.sum(axis=0, dtype=np.float64)
    keys = place[there] * (int(tokens.max(initial=0)) + 1) + tokens[there]
    _, counts = np.unique(keys, return_counts=True)
    return float((counts * (counts - 1.0)).sum() / 2), float((n_there * (n_there - 1)).sum() / 2)
