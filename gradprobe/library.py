"""The toolkit's numbers for one's own code: gradients, dumps, participation ratio, alignment, intervals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .analysis.bucket import Bucket
from .analysis.inputs import open_dumps
from .analysis.jackknife import Estimate, estimate_of
from .common.errors import InputError
from .dump import format as dump
from .exp1.spectrum import participation_ratio as participation_ratio_of_energies
from .exp2.direction import Alignment
from .exp2.measure import Exp2Settings, bucket_directions

BATCH_TOKENS = 4096


def load_dump(path: str | Path) -> dump.Dump:
    """A dump of one target, opened as the analyses do: files checked, faulty rows left out.

    Returns:
        `grads` [n, row_dim] float32 (a memory map, or some rows of one) and, one entry per row, `entropy` (nats),
        `bin`, `correct`, `prompt`, `sample_idx`, `pos`; `rows_of_bucket(b)` gives the rows of an entropy bucket;
        `warnings` says what was left out.
    """
    dumps = open_dumps({None: Path(path)})[None]
    if len(dumps) > 1:
        raise InputError(f"{path}: holds {len(dumps)} targets; load one: {', '.join(d.path.name for d in dumps)}")
    return dumps[0]


def row_gradients(
    model: Any,
    prompt_ids: list[int],
    response_ids: list[int],
    positions: list[int] | np.ndarray | None = None,
    *,
    layer: int | None = None,
    param_suffix: str = "mlp.down_proj.weight",
    row_idx: int = 0,
) -> np.ndarray:
    """∇ log π_t with respect to one row of one linear weight, at tokens of one response.

    Args:
        model: a causal language model of transformers. It is put into eval mode, and its weights are frozen.
        prompt_ids, response_ids: token ids.
        positions: which response tokens, counted from 0, each at most once; None for all.
        layer: None for the middle one.
        param_suffix: a linear weight inside the layer.
        row_idx: the row of W in y = W x.

    Returns:
        [n_positions, row_dim] float32 (float64 under a float64 model), in the order of `positions`.
    """
    from .gradients.engine import GradientEngine
    from .gradients.targets import expand_targets

    wanted = np.arange(len(response_ids)) if positions is None else np.asarray(positions, dtype=np.int64)
    if len(np.unique(wanted)) != len(wanted) or not np.isin(wanted, np.arange(len(response_ids))).all():
        raise InputError(f"positions must be distinct and from 0 to {len(response_ids) - 1}")
    model.eval().requires_grad_(False)
    (target,) = expand_targets(model, None if layer is None else str(layer), param_suffix, str(row_idx), seed=0)
    engine = GradientEngine(model, [target])
    found: dict[int, np.ndarray] = {}
    order = np.sort(wanted)
    for _, rows, (gradients,) in engine.batches([prompt_ids], [response_ids], [order], BATCH_TOKENS):
        found.update(zip(order[rows].tolist(), gradients.cpu().numpy(), strict=True))
    return np.stack([found[t] for t in wanted.tolist()]) if found else np.zeros((0, target.row_dim(model)), np.float32)


def participation_ratio(gradients: np.ndarray, *, unit_norm: bool = False) -> float | None:
    """(Σ λ)² / Σ λ² of the squared singular values λ of `gradients`, not centred: how many directions they span.

    Args:
        gradients: [n, d].
        unit_norm: scale every row to length 1 first, so that few long rows don't decide.

    Returns:
        From 1 to min(n, d); None where no row has a length.
    """
    rows = np.asarray(gradients, dtype=np.float64)
    if unit_norm:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    of_nobody = np.zeros(len(rows), int)
    return participation_ratio_of_energies(Bucket(rows, np.arange(len(rows)), of_nobody, of_nobody).energies())


def alignment(loaded: dump.Dump, bucket: int | None = None, *, seed: int = 0) -> Alignment:
    """ρ between what correct and what incorrect rollouts of a prompt push, with noise removed, in one entropy bucket.

    Args:
        loaded: of `load_dump`.
        bucket: None for the one of highest entropy.
        seed: of bootstrap and permutations.

    Returns:
        `rho`, `ci95`, `p_value`, `min_detectable`, `n_prompts`, `verdict` (aligned, opposed, orthogonal, underpowered,
        unsampled) and its `reason`, as in `exp2_summary.json`; see `direction.alignment` for the formulas.
    """
    index = loaded.bins - 1 if bucket is None else bucket
    return bucket_directions(loaded, index, Exp2Settings(seed=seed)).alignment


def jackknife(measure: Callable[[np.ndarray], Any], prompt: np.ndarray) -> Estimate:
    """A measure of one's own and its 95% interval over prompts, by the delete-one jackknife that all analyses share.

    Args:
        measure: takes [k] ascending row numbers and returns a number, first of all rows, then without each prompt's. It
            should move smoothly with the rows, as means, ratios and correlations do and medians do not.
        prompt: [n] each row's prompt, for example `dump.prompt`.

    Returns:
        `value` and `ci95`, both None with fewer than 3 prompts, or where a number is not finite.
    """
    codes = np.unique(np.asarray(prompt), return_inverse=True)[1]
    left_out = range(-1, codes.max(initial=-1) + 1)
    return estimate_of(np.array([measure(np.flatnonzero(codes != code)) for code in left_out], np.float64))
