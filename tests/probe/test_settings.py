"""Every flag is a setting: what goes with which others, and which defaults are told."""

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from gradprobe.common.errors import InputError
from gradprobe.probe.settings import ProbeSettings, add_flags

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
