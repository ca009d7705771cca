"""In what tags differ beside the weights: said wherever their numbers stand side by side."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..common.console import printable
from ..common.errors import raise_if_any
from ..dump.format import ROLLOUTS, target_name
from ..dump.on_policy import are_same_weights

log = logging.getLogger(__name__)
Manifest = Mapping[str, Any]
Tag = TypeVar("Tag", bound="str | None")
LONGEST_VALUE = 60
TARGET = ("target", "row_idx", "row_dim", "projection")
OWN_LINES = {
    *("distribution", "method", "temperature", "max_new_tokens", "num_samples_per_prompt", "verifier"),
    *("seed", "num_prompts_of_study"),
}
"""Of `sampling`: what has a line of its own below, or may differ."""


class Opened(Protocol):
    """A dump, or what is known of one."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> dict[str, Any]: ...


def refuse_different_targets(dumps: Mapping[Tag, Sequence[Opened]]) -> None:
    """Raise `InputError` unless every tag has the first's targets, in its order: gradients of others can't be compared.

    Only dumps that are named differently (other directories) but of the same weights, row, length and projection pass.
    """
    (first_tag, first), *others = dumps.items()
    raise_if_any(
        f"{first_tag} and {tag} are of different targets, which can't be compared: {_targets(first)} in "
        f"{first[0].path.parent if len(first) > 1 else first[0].path}, {_targets(found)} in "
        f"{found[0].path.parent if len(found) > 1 else found[0].path}"
        for tag, found in others
        if [_target(one.manifest) for one in first] != [_target(one.manifest) for one in found]
    )


def _target(manifest: Manifest) -> list[Any]:
    return [manifest.get(key) for key in TARGET]


def _targets(dumps: Sequence[Opened]) -> str:
    """What was probed, in words; of projections the seed and the weights' shapes too may be what differs."""
    found = []
    for manifest in (dump.manifest for dump in dumps):
        projection = manifest.get("projection") or {}
        seed = f", seed {projection['seed']}" if "seed" in projection else ""
        found.append(f"{target_name(manifest)} of {manifest['row_dim']} numbers{seed}")
    return ", ".join(found)


def say_differences(dumps: Mapping[Tag, Sequence[Opened]]) -> dict[Tag, list[str]]:
    """Of each tag, its differences from the first, a line each; all are said as warnings."""
    (first_tag, first), *others = dumps.items()
    found: dict[Tag, list[str]] = {first_tag: []}
    for tag, (dump, *_) in others:
        found[tag] = list(_differences(first_tag, first[0].manifest, tag, dump.manifest))
    for (one, (here, *_)), (other, (there, *_)) in itertools.combinations(dumps.items(), 2):
        same = f"{one} and {other} have the same weights and"
        if _is_same(here, there):
            found[other].append(f"{same} the same rollouts: one dump, two names")
        elif _are_one_model_s_rollouts(here.manifest, there.manifest):
            found[other].append(f"{same} other rollouts: no training lies between them")
    for line in itertools.chain(*found.values()):
        log.warning(line)
    return found


def _differences(first_tag: str | None, first: Manifest, tag: str | None, other: Manifest) -> Iterator[str]:
    silent: dict[tuple[str | None, str | None], list[str]] = {}
    names = dict.fromkeys([*READ, *_versions(first), *_versions(other)])
    for name in names:
        here, there = (READ.get(name, lambda m, name=name: _versions(m).get(name))(m) for m in (first, other))
        if here == there:
            continue
        if here is None or there is None:
            silent.setdefault((first_tag, tag) if here is None else (tag, first_tag), []).append(name)
        else:
            yield f"{first_tag} and {tag} differ in {name}: {_shown(here)} and {_shown(there)}"
    for (quiet, told), missing in silent.items():
        yield f"{quiet} doesn't tell what {told} does: {', '.join(missing)}"


def _shown(value: Any) -> str:
    """A value on one line, clipped, without the machine's directories."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = printable(text)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _data_set(manifest: Manifest) -> str | None:
    found = manifest.get("dataset") or {}
    if not found.get("sha256"):
        return None
    return f"{os.path.basename(str(found.get('path', '')))} ({str(found['sha256'])[:12]})"


def _device(manifest: Manifest) -> str | None:
    device = manifest.get("device")
    return None if not isinstance(device, str) else "CPU" if device.startswith("cpu") else "GPU"


def _versions(manifest: Manifest) -> dict[str, Any]:
    found = manifest.get("versions")
    return {f"version of {name}": version for name, version in found.items()} if isinstance(found, dict) else {}


def _part(*path: str) -> Callable[[Manifest], Any]:
    """Reads what stands under a path of keys; None where there is none."""

    def read(manifest: Any) -> Any:
        for key in path:
            manifest = manifest.get(key) if isinstance(manifest, dict) else None
        return manifest

    return read


def _of_rollouts(manifest: Manifest) -> Any:
    """Whether rollouts were sampled here, or where their verdicts came from."""
    given = manifest.get("rollouts_from")
    if not isinstance(given, dict):
        return "sampled by the probe"
    return {key: given.get(key) for key in ("format", "correct_from", "correct_above", "verifier") if key in given}


READ: dict[str, Callable[[Manifest], Any]] = {
    "data set": _data_set,
    "rendering of prompts": lambda manifest: manifest.get("prompts") or "none",
    **{key: _part(key) for key in ("temperature", "max_new_tokens", "num_samples_per_prompt")},
    "distribution sampled from": _part("sampling", "distribution"),
    "sampling method": _part("sampling", "method"),
    "sampler": lambda manifest: {k: v for k, v in (manifest.get("sampling") or {}).items() if k not in OWN_LINES},
    "verifier": _part("sampling", "verifier"),
    "source of rollouts": _of_rollouts,
    "tokenizer": _part("model_identity", "tokenizer_sha256"),
    **{key: _part(key) for key in ("end_ids", "dtype", "attention")},
    "device": _device,
    **{key: _part(key) for key in ("bins", "entropy_edges_over", "pos_per_bin_per_rollout")},
    "entropy_edges given": lambda manifest: "yes" if manifest.get("entropy_edges_from") else "no",
    "bucket_by": lambda manifest: manifest.get("bucket_by", "entropy"),
    "pooling": lambda manifest: manifest.get("pooling", "none"),
}
"""What a reader has to know, by the name it is said under; None where a manifest does not tell it."""


def _is_same(one: Opened, other: Opened) -> bool:
    """Whether two tags are the same weights on the same rollouts, looked at in the same way."""
    if one.path.resolve() == other.path.resolve():
        return True
    keys = (_part("model_identity"), _part("checksums", ROLLOUTS))
    known = [(read(one.manifest), read(other.manifest)) for read in keys]
    is_equal = all(here is not None and here == there for here, there in known)
    return is_equal and _are_seen_alike(one.manifest, other.manifest)


def _are_seen_alike(one: Manifest, other: Manifest) -> bool:
    """Whether tokens are put into buckets in the same way: rules side by side are meant."""
    return all(READ[name](one) == READ[name](other) for name in ("bucket_by", "pooling"))


def _are_one_model_s_rollouts(one: Manifest, other: Manifest) -> bool:
    """Whether two tags are the same weights on rollouts that are known to be others."""
    identities = [_part("model_identity")(manifest) for manifest in (one, other)]
    rollouts = [_part("checksums", ROLLOUTS)(manifest) for manifest in (one, other)]
    is_known = None not in rollouts and all(isinstance(identity, dict) for identity in identities)
    return is_known and _are_seen_alike(one, other) and are_same_weights(*identities)


def study_of(manifest: Manifest) -> dict[str, Any]:
    """By what dumps of tokens and pooled ones of the same rollouts know each other; None where a manifest is silent."""
    hashes = manifest.get("prompt_hashes")
    prompts = None if hashes is None else hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()
    return {
        "model_identity": manifest.get("model_identity"),
        "prompts": prompts,
        "data set": _part("dataset", "sha256")(manifest),
        "seed of sampling": _part("sampling", "seed")(manifest),
        **{key: manifest.get(key) for key in ("num_rollouts", "num_response_tokens", "temperature")},
    }


def other_study(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two of `study_of` contradict each other; that neither the model nor the other tells is one too."""
    known = [key for key in one if one[key] is not None and other.get(key) is not None]
    differing = [key for key in known if one[key] != other[key]]
    return differing or ([] if "model_identity" in known else ["model_identity, which one of them doesn't tell"])
