"""Which weights carry it: plain loops over pairs of prompts, one planted weight, shuffled outcomes, along the step."""

import itertools
import json
from pathlib import Path

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off

import analyze_exp3_signal
from gradprobe.analysis.inputs import open_dumps, pooled_of
from gradprobe.analysis.jackknife import ratio_of
from gradprobe.analysis.pooled import Pooled, iter_prompts
from gradprobe.exp3 import step
from gradprobe.exp3.signal import signal_of_pooled
from gradprobe.exp3.weights import update_weights
from gradprobe.figures.by_weight import BY_WEIGHT, draw_by_weight, told_by_weight
from gradprobe.figures.exp3 import draw_exp3

KINDS, N_LAYERS, SIZE = ("self_attn.q_proj", "mlp.up_proj"), 3, 8
NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(N_LAYERS) for kind in KINDS]
PLANTED = NAMES.index("model.layers.1.mlp.up_proj.weight")


def dump_of(path: Path, seed: int = 0, signal: float = 1.2, n_prompts: int = 40, shuffled: bool = False) -> Path:
    """All weights' numbers side by side: noise of length 1 in each, and in one the outcome, too."""
    rng = np.random.default_rng(seed)
    shape = (n_prompts, 8, 3, len(NAMES), SIZE)
    correct = rng.random(shape[:2]) < rng.uniform(0.2, 0.8, (n_prompts, 1))
    sums = rng.standard_normal(shape) / np.sqrt(SIZE)
    sums[..., PLANTED, 0] += signal * (correct - 0.5)[:, :, None] * [0.2, 0.5, 1.0]
    correct = rng.permuted(correct, axis=1) if shuffled else correct
    weights = [{"name": name, "offset": k * SIZE, "rows": 64, "cols": 32} for k, name in enumerate(NAMES)]
    projection = {"rows": 4, "cols": 2, "seed": 0, "weights": weights}
    sums = sums.reshape(*shape[:3], -1)
    n_tokens = rng.integers(1, 5, shape[:3])
    return planted.write_pooled_dump(path, sums, correct, n_tokens, projection=projection, target="all-linear")


def pooled(path: Path, **how) -> Pooled:
    return pooled_of(open_dumps({"a": dump_of(path, **how)})["a"][0])


def test_shares_equal_plain_loops_over_pairs_of_prompts_with_each_left_out(tmp_path):
    dump = pooled(tmp_path / "a", n_prompts=12, signal=4.0)
    updates = [
        np.einsum("r,rbd->d", update_weights(of.outcome, of.n_response_tokens, "dapo"), of.sums).reshape(len(NAMES), -1)
        for of in iter_prompts(dump)
    ]

    def measured(kept: list[np.ndarray]) -> dict[str, np.ndarray]:
        pairs = list(itertools.permutations(range(len(kept)), 2))
        signal = np.array([sum(kept[p][w] @ kept[q][w] for p, q in pairs) / len(pairs) for w in range(len(NAMES))])
        energy = np.array([sum(u[w] @ u[w] for u in kept) / len(kept) for w in range(len(NAMES))])
        return {"share": signal, "noise_share": energy - signal}

    stacks = [measured(updates), *(measured(updates[:p] + updates[p + 1 :]) for p in range(len(updates)))]
    groups = {
        "weights": {name: [k] for k, name in enumerate(NAMES)},
        "kinds": {kind: [k for k, name in enumerate(NAMES) if kind in name] for kind in KINDS},
        "layers": {str(layer): [2 * layer, 2 * layer + 1] for layer in range(N_LAYERS)},
    }
    for (margin, members), key in itertools.product(groups.items(), ("share", "noise_share")):
        carried, stack = signal_of_pooled(dump).by_weight[margin], np.array([one[key] for one in stacks])
        assert carried.keys() == members.keys()
        for group, of in members.items():
            found, expected = getattr(carried[group], key), ratio_of(stack[:, of].sum(axis=1), stack.sum(axis=1))
            assert (found.value, *found.ci95) == pytest.approx((expected.value, *expected.ci95), rel=1e-7)
        assert sum(getattr(one, key).value for one in carried.values()) == pytest.approx(1)


def test_one_weight_s_signal_is_read_back_and_shuffled_outcomes_leave_no_share(tmp_path):
    inside, of_noise, seen = [], [], []
    for seed in range(24):
        carried = signal_of_pooled(pooled(tmp_path / f"{seed}", seed=seed)).by_weight["weights"]
        inside += [c.share.ci95[0] <= (name == NAMES[PLANTED]) <= c.share.ci95[1] for name, c in carried.items()]
        of_noise += [c.noise_share.value for name, c in carried.items() if name != NAMES[PLANTED]]
        nothing = signal_of_pooled(pooled(tmp_path / f"s{seed}", seed=seed, shuffled=True)).by_weight["weights"]
        seen += [any(one.share.ci95 for one in nothing.values())]
        assert sum(one.noise_share.value for one in nothing.values()) == pytest.approx(1)
    assert 0.91 < np.mean(inside) < 0.99
    assert np.mean(of_noise) < 1 / len(NAMES)
    assert sum(seen) <= 3


def with_step(dump: Path, strength: float = 1.0) -> Path:
    """A step of which 75% lie in one weight and 25% in one outside of layers; the others' parts are noise."""
    planted.plant_step(dump, strength * np.array([0.0, 0.3, 0.6]))
    rng, lines = np.random.default_rng(0), []
    for line in map(json.loads, (dump / "rollouts.jsonl").read_text().splitlines()):
        noise, whole = rng.standard_normal(len(NAMES) + 1) / 10, sum(line["step"])
        parts = noise - noise.mean()
        parts[PLANTED] += 0.75 * whole
        parts[-1] += 0.25 * whole
        lines.append(json.dumps(line | {"step_by_weight": parts.tolist()}) + "\n")
    (dump / "rollouts.jsonl").write_text("".join(lines))
    manifest = json.loads((dump / "manifest.json").read_text())
    manifest["step"]["weights"] = [*NAMES, "model.norm.weight"]
    (dump / "manifest.json").write_text(json.dumps(manifest))
    return dump


def run(output_dir: Path, *dumps: str) -> tuple[int, dict]:
    status = analyze_exp3_signal.main(["--output-dir", str(output_dir), *dumps])
    file = output_dir / "exp3_summary.json"
    return status, json.loads(file.read_text()) if file.exists() else {}


def test_along_the_step_shares_of_the_gain_are_read_back_and_drawn_beside_the_signal_s(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "PERMUTATIONS", 100)
    dump, nothing = with_step(dump_of(tmp_path / "a")), with_step(dump_of(tmp_path / "b", signal=0.0), strength=0.0)
    summary = run(tmp_path / "out", f"a={dump}", f"b={nothing}")[1]
    found = summary["a"]["step"]["by_weight"]
    expected = {"self_attn.q_proj": 0.0, "mlp.up_proj": 0.75, "model.norm.weight": 0.25}
    for kind, share in expected.items():
        low, high = found["kinds"][kind]["share"]["ci95"]
        assert low < share < high
        assert high - low < 0.4
    assert found["layers"].keys() == {"0", "1", "2"}
    for key in ("share", "noise_share"):
        assert sum(one[key]["value"] for one in found["weights"].values()) == pytest.approx(1)
    assert {one["share"]["value"] for one in summary["b"]["step"]["by_weight"]["weights"].values()} == {None}
    printed = capsys.readouterr().out
    assert printed.count("every kind of weight") == 2  # of the tag without any share none
    told = told_by_weight(summary)
    assert [what for _, what, _ in told] == ["the step's gain", "the update's signal"]
    assert {subject.tag for subject, _, _ in told} == {"a"}
    figure = draw_by_weight(told)
    (image,) = figure.subfigs[0].axes[2].images
    shares = np.array([found["weights"][name]["share"]["value"] for name in NAMES]).reshape(N_LAYERS, 2).T
    np.testing.assert_allclose(image.get_array()[:2], shares)
    assert image.get_array().mask[2].all()  # no layer's
    assert_nothing_is_cut_off(figure, BY_WEIGHT)
    assert BY_WEIGHT in summary["a"]["files"]
    assert BY_WEIGHT not in draw_exp3({"b": summary["b"]})


def test_sums_of_other_weights_than_the_manifest_s_are_bad_input(tmp_path, capsys):
    dump = with_step(dump_of(tmp_path / "a", n_prompts=4))
    manifest = json.loads((dump / "manifest.json").read_text())
    manifest["step"]["weights"].pop()
    (dump / "manifest.json").write_text(json.dumps(manifest))
    assert run(tmp_path / "out", f"a={dump}")[0] == 2
    assert "not of the manifest's 6 weights" in capsys.readouterr().err
