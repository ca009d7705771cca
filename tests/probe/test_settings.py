"""Every flag is a setting: what goes with which others, and which defaults are told."""

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch

from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import resolve_device
from gradprobe.probe.settings import ProbeSettings, add_flags, settings_of_task

OTHER_VALUES = {"rollouts": [Path("x")], "pool": "bucket", "chat_template": True, "continue_final_message": True}
REASONS = [
    (s.name, key, s.metadata[key])
    for s in fields(ProbeSettings)
    for key in ("only_with", "never_with")
    if key in s.metadata
]


@pytest.mark.parametrize(("name", "key", "quoted"), REASONS)
def test_what_needs_or_excludes_another_setting_is_refused_with_both_named(name, key, quoted):
    """A setting that isn't there, misspelled in the metadata, would show here."""
    other = quoted.split("`")[1]
    given = {one: OTHER_VALUES.get(one, "another") for one in ((name,) if key == "only_with" else (name, other))}
    given |= {one: 2 for one in given if one.startswith(("num_", "skip_", "max_new", "pos_per", "temp"))}
    with pytest.raises(InputError, match=f"`{name}` .*{quoted}"):
        ProbeSettings(model_path="m", output_dir=Path("o"), **given).check()


def test_help_tells_every_default_that_is_not_none(capsys):
    wide = partial(argparse.HelpFormatter, max_help_position=99, width=999)  # a flag, a line
    parser = argparse.ArgumentParser(formatter_class=wide)
    add_flags(parser)
    parser.print_help()
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  --"))
    for setting in fields(ProbeSettings):
        if isinstance(setting.default, str | int | float) and not isinstance(setting.default, bool):
            assert "(default: " in told["--" + setting.name.replace("_", "-")]
    assert "(default: 64)" in told["--num-prompts"]  # where responses are sampled


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [("rarity", "must be one of entropy, "), ("score:", "must be one of"), ("score:x", "name it by `rollouts`")],
)
def test_a_rule_of_buckets_that_can_not_be_is_refused_with_the_other_settings(rule, complaint):
    settings = ProbeSettings(model_path="m", output_dir=Path("o"), pool="bucket", bucket_by=rule, bins=1)
    with pytest.raises(InputError, match=f"`bins` 1.*`bucket_by` {rule}: .*{complaint}"):
        settings.check()


TASKS_OF = {
    "torchrun": {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"},
    "srun": {"SLURM_PROCID": "11", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3"},
    # A task of srun on each node starts torchrun there: the inner one counts.
    "both": {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
}


@pytest.mark.parametrize("started_by", TASKS_OF)
@pytest.mark.parametrize(
    ("n_visible", "given", "device"),
    [
        (8, "auto", "cuda:3"),
        (8, "cuda", "cuda:3"),
        (4, "auto", "cuda:3"),  # four of the node's, named by CUDA_VISIBLE_DEVICES: counted among these
        (2, "auto", "cuda:1"),  # more tasks than GPUs take them in turn
        (1, "auto", "auto"),  # bound to the task, which sees no other
        (0, "auto", "auto"),
        (8, "cpu", "cpu"),
        (8, "cuda:5", "cuda:5"),
    ],
)
def test_a_task_takes_the_gpu_of_its_number_on_its_node(monkeypatch, started_by, n_visible, given, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_visible)
    settings = ProbeSettings(model_path="m", output_dir=Path("o"), device=given)
    found = settings_of_task(settings, TASKS_OF[started_by])
    assert (found.device, found.shard_index, found.num_shards, found.output_dir.name) == (device, 11, 16, "o_s11")
    as_resolved = {"auto": "cuda" if n_visible else "cpu"}.get(found.device, found.device)
    assert resolve_device(found.device) == torch.device(as_resolved)


def test_weights_spread_over_gpus_are_not_for_tasks_that_see_the_same_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = ProbeSettings(model_path="m", output_dir=Path("o"), device_map="auto")
    with pytest.raises(InputError, match="not in several tasks of torchrun"):
        settings_of_task(settings, TASKS_OF["torchrun"])
    assert settings_of_task(settings, TASKS_OF["srun"]).device == "auto", "srun may have bound other GPUs to each"
