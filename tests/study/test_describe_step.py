"""describe_step.py: of every weight the change's size and spectrum, against numpy."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from looking import assert_nothing_is_cut_off
from planted import write_dump_along_step
from tiny import tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM

import analyze_exp3_signal
import describe_step
import plot_exp12_intuitive
from gradprobe.figures.step_weights import WEIGHTS, draw_weights, table_by_kind
from gradprobe.gradients.step_weights import weights_of_step

VECTOR = "model.layers.1.input_layernorm.weight"
WIDE = "model.layers.0.mlp.down_proj.weight"
UNTOUCHED = "model.layers.2.self_attn.o_proj.weight"


def describe(output: Path, *arguments: object) -> dict:
    assert describe_step.main(["--output-dir", str(output), *map(str, arguments)]) == 0
    return json.loads((output / "step_summary.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The tiny checkpoint after a step of every second entry of all its weights but one."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("trained") / "trained", seed=0)
    model, generator = tiny_model(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != UNTOUCHED:
                change = 0.01 * torch.randn(parameter.shape, generator=generator)
                parameter.view(-1)[::2] += change.view(-1)[::2]
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def described(checkpoint_dir, trained, tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("step") / "out"
    return describe(output, "--from", checkpoint_dir, "--to", trained), output


def test_every_weight_s_change_is_numpy_s(described, checkpoint_dir, trained):
    step, output = described
    start, end = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint_dir, trained))
    ends = dict(end.named_parameters())
    assert (step["from"], step["to"], step["files"]) == ("model", "trained", [WEIGHTS])
    assert list(step["weights"]) == list(ends)
    assert (output / WEIGHTS).read_bytes().startswith(b"\x89PNG")
    for name, before in start.named_parameters():
        found = step["weights"][name]
        before, after = (p.detach().double().numpy() for p in (before, ends[name]))
        delta = after - before
        assert found["unchanged_share"] == pytest.approx(np.mean(after == before))
        if np.any(before):
            assert found["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(before), rel=1e-4)
        else:
            assert found["relative_norm"] is None
        assert found["is_left_out"] is False
        if delta.ndim == 2 and delta.any():
            energies = np.linalg.svd(delta, compute_uv=False) ** 2
            assert found["top1_energy"] == pytest.approx(energies[0] / energies.sum(), rel=1e-4)
            held = np.cumsum(energies) / energies.sum()
            assert np.abs(held - 0.95).min() > 1e-6
            assert found["rank95"] == np.argmax(held >= 0.95) + 1
        else:
            assert (found["top1_energy"], found["rank95"]) == (None, None)
    assert step["weights"][UNTOUCHED]["relative_norm"] == 0
    assert step["weights"][UNTOUCHED]["unchanged_share"] == 1
    assert step["weights"][WIDE]["unchanged_share"] == pytest.approx(0.5, abs=0.02)
    assert step["weights"][WIDE]["rank95"] > 5


def test_an_adapter_of_rank_1_moves_in_one_direction(checkpoint_dir, tmp_path):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=1, init_lora_weights=False, target_modules=["down_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint_dir), config)
    adapted.save_pretrained(tmp_path / "adapter")
    ends = ["--from", checkpoint_dir, "--to", checkpoint_dir, "--to-adapter", tmp_path / "adapter"]
    weights = describe(tmp_path / "out", *ends)["weights"]
    for name, found in weights.items():
        if "down_proj" in name:
            assert found["top1_energy"] == pytest.approx(1, abs=1e-6)
            assert found["rank95"] == 1
        else:
            assert (found["relative_norm"] or 0, found["unchanged_share"]) == (0, 1)
    assert sum("down_proj" in name for name in weights) == 3


def test_what_time_does_not_suffice_for_is_left_out_and_said(described, checkpoint_dir, trained, tmp_path, capsys):
    hurried = describe(tmp_path / "out", "--from", checkpoint_dir, "--to", trained, "--seconds", 0)
    table = capsys.readouterr().out
    matrices = [name for name, found in described[0]["weights"].items() if found["top1_energy"] is not None]
    n_left_out = len(matrices) + 1  # the untouched one was not looked at, either
    assert sum(found["is_left_out"] for found in hurried["weights"].values()) == n_left_out
    assert f"{n_left_out} spectra are left out for time" in table
    for name, found in hurried["weights"].items():
        full = described[0]["weights"][name]
        assert (found["top1_energy"], found["rank95"]) == (None, None)
        assert (found["relative_norm"], found["unchanged_share"]) == (full["relative_norm"], full["unchanged_share"])


def test_the_cheap_spectra_come_first(checkpoint_dir, trained):
    start, end = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint_dir, trained))
    order = [name for name, _ in weights_of_step(start, end, 10.0)]
    assert order.index(VECTOR) < order.index("model.layers.0.self_attn.k_proj.weight") < order.index(WIDE)
    assert set(order[-2:]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_heat_maps_are_the_summary_s_and_nothing_is_cut_off(described):
    step = described[0]
    figure = draw_weights(step)
    assert_nothing_is_cut_off(figure)
    kinds = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert set(kinds) == {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for ax, measure in zip(figure.axes, ("relative_norm", "unchanged_share", "top1_energy"), strict=False):
        drawn = ax.images[0].get_array()
        for row, kind in zip(drawn, kinds, strict=True):
            expected = [step["weights"][f"model.layers.{layer}.{kind}.weight"][measure] for layer in range(3)]
            np.testing.assert_allclose(row.filled(np.nan), np.array(expected, float))
    rows = {row[0]: row for row in table_by_kind(step).rows}
    median = np.median([step["weights"][f"model.layers.{layer}.mlp.down_proj.weight"]["rank95"] for layer in range(3)])
    assert rows["mlp.down_proj"][1] == "3"
    assert float(rows["mlp.down_proj"][-1]) == pytest.approx(median, abs=0.5)


def test_a_long_deep_name_is_not_cut_off_nor_spectra_that_are_left_out(described):
    step = json.loads(json.dumps(described[0]))
    of_layer_0 = {name: found for name, found in step["weights"].items() if ".0." in name}
    for layer in range(3, 48):
        step["weights"] |= {name.replace(".0.", f".{layer}."): found for name, found in of_layer_0.items()}
    for found in step["weights"].values():
        found |= {"top1_energy": None, "rank95": None, "is_left_out": found["top1_energy"] is not None}
    names = {"from": "Qwen2.5-1.5B-Instruct", "to": "Qwen2.5-1.5B-Instruct-DAPO-step-500"}
    assert_nothing_is_cut_off(draw_weights(step | names))


def test_checkpoints_of_other_shapes_are_refused(checkpoint_dir, tmp_path, capsys):
    wider = tiny_checkpoint(tmp_path / "wider", seed=0)
    tiny_model(0, intermediate_size=32).save_pretrained(wider)
    assert describe_step.main(["--from", str(checkpoint_dir), "--to", str(wider), "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "mlp.gate_proj.weight is [32, 16]" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "step_summary.json").exists()


def test_the_page_has_its_figure_where_exp3_looks_along_the_same_step(described, tmp_path):
    figures = tmp_path / "figures"
    dump = write_dump_along_step(tmp_path / "base", np.linspace(0, 0.5, 5), n_prompts=12)
    tagged = ["--output-dir", str(figures), f"base={dump}"]
    assert analyze_exp3_signal.main(tagged) == 0
    for end, is_shown in (("models/trained", True), ("models/another", False)):
        of_step = described[0] | {"from": "models/base", "to": end}
        (figures / "step_summary.json").write_text(json.dumps(of_step))
        (figures / WEIGHTS).write_bytes((described[1] / WEIGHTS).read_bytes())
        assert plot_exp12_intuitive.main(tagged) == 0
        page = (figures / "report.html").read_text(encoding="utf-8")
        assert "<figcaption>exp3_step.png</figcaption>" in page
        assert (f"<figcaption>{WEIGHTS}</figcaption>" in page) == is_shown
        assert ("What the step itself is like" in page) == is_shown
