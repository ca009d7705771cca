"""Which prompts of two dumps are the same: told by what a prompt is, not by where it stands in a data set."""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..common.errors import InputError, first_of
from ..dump.format import META, Dump, find_rollouts, prompt_hashes_of
from ..dump.records import PromptKey, Rollout, iter_rollouts, prompt_hash

Tag = TypeVar("Tag", bound="str | None")
Identities = Mapping[PromptKey, Hashable]
BY_HASH, BY_DATA_SET, BY_INDEX = "token ids", "data set and prompt_idx", "prompt_idx"


@dataclass(frozen=True)
class Pairs:
    """How a dump's prompts were paired with the first dump's.

    Attributes:
        by: `BY_HASH`; of dumps that lack ids `BY_DATA_SET`; where no data set is named either, `BY_INDEX`.
        n_prompts: how many prompts have gradients in both.
    """

    by: str
    n_prompts: int

    @property
    def is_certain(self) -> bool:
        """Whether equal numbers are known to mean equal prompts."""
        return self.by != BY_INDEX


def number_prompts(dumps: Mapping[Tag, Dump]) -> tuple[dict[Tag, np.ndarray], dict[Tag, Pairs]]:
    """Numbers by which every dump's prompts are compared with the first's: the only place where prompts are paired.

    Returns:
        Of each tag, [len(prompt_keys)] distinct numbers, a prompt's the same as in the first dump where that has it;
        and of each tag but the first, how that was told.

    Raises:
        InputError: a dump's rollouts lack a prompt of its gradients.
    """
    (first_tag, first), *others = dumps.items()
    by_hash = {tag: _by_hash(dump) for tag, dump in dumps.items()} if others else {}
    owners: dict[Tag, list[tuple[str, int, int]]] = {first_tag: _entries(first, 0)}
    pairs: dict[Tag, Pairs] = {}
    with_gradients = set(np.unique(first.prompt).tolist())
    for place, (tag, dump) in enumerate(others, 1):
        by, here, there = _identities(first, by_hash[first_tag], dump, by_hash[tag])
        index_of = {here[key]: index for index, key in enumerate(first.prompt_keys)}
        matches = [index_of.get(there[key]) for key in dump.prompt_keys]
        owners[tag] = [
            own if match is None else owners[first_tag][match]
            for own, match in zip(_entries(dump, place), matches, strict=True)
        ]
        in_both = (matches[index] for index in np.unique(dump.prompt))
        pairs[tag] = Pairs(by, sum(match in with_gradients for match in in_both))
    # In the order of their keys as texts, whichever way they were paired: random draws go by it.
    number_of = {owner: number for number, owner in enumerate(sorted(set(itertools.chain(*owners.values()))))}
    numbers = {tag: np.array([number_of[owner] for owner in found], np.int64) for tag, found in owners.items()}
    return numbers, pairs


def _entries(dump: Dump, place: int) -> list[tuple[str, int, int]]:
    return [(str(key), place, index) for index, key in enumerate(dump.prompt_keys)]


def _identities(
    first: Dump, of_first: Identities | None, other: Dump, of_other: Identities | None
) -> tuple[str, Identities, Identities]:
    """What both dumps know their prompts by."""
    if of_first is not None and of_other is not None:
        return BY_HASH, of_first, of_other
    of_first, of_other = _by_data_set(first), _by_data_set(other)
    if of_first is not None and of_other is not None:
        return BY_DATA_SET, of_first, of_other
    return BY_INDEX, *({key: key for key in dump.prompt_keys} for dump in (first, other))


def with_prompts_once(dump: Dump) -> Dump:
    """The dump with prompts of equal token ids as one, since rollouts of a problem's copies are no news of another."""
    new, keys = _key_of_copies(dump), dump.prompt_keys
    if not new:
        return dump
    once = sorted({new.get(key, (key, 0))[0] for key in keys})
    place = {key: code for code, key in enumerate(once)}
    codes, first_samples = np.array([(place[new.get(key, (key, 0))[0]], new.get(key, (key, 0))[1]) for key in keys]).T
    n = len({key for key, _ in new.values()})
    warning = f"{dump.path}: {n} prompts stand under several prompt_idx; in all that follows each of them is one"
    return replace(
        dump,
        prompt_keys=once,
        prompt=codes[dump.prompt],
        sample_idx=dump.sample_idx + first_samples[dump.prompt],
        warnings=(*dump.warnings, warning),
    )


def rollouts_of(dump: Dump) -> Iterator[Rollout]:
    """The lines of a dump's `rollouts.jsonl`, named as in `with_prompts_once`; none where it has no such file."""
    new, file = _key_of_copies(dump), find_rollouts(dump.path)
    for rollout in () if file is None else iter_rollouts(file):
        key, first_sample = new.get(rollout.prompt_idx, (rollout.prompt_idx, 0))
        yield replace(rollout, prompt_idx=key, sample_idx=rollout.sample_idx + first_sample)


def _key_of_copies(dump: Dump) -> dict[PromptKey, tuple[PromptKey, int]]:
    """Of a prompt that has the ids of one before it, the key of that, and from where its samples are counted."""
    of_hash: dict[Hashable, list[PromptKey]] = defaultdict(list)
    for key, value in sorted((_by_hash(dump) or {}).items()):
        of_hash[value].append(key)
    return {key: (keys[0], k << 32) for keys in of_hash.values() for k, key in enumerate(keys) if k}


def _by_hash(dump: Dump) -> Identities | None:
    """Each prompt's hash, from the manifest, else from the rollouts; None without either."""
    hashes, file = prompt_hashes_of(dump.manifest), find_rollouts(dump.path)
    if hashes is None and file is not None:
        hashes = {rollout.prompt_idx: prompt_hash(rollout.prompt_ids) for rollout in iter_rollouts(file)}
        missing = [key for key in dump.prompt_keys if key not in hashes]
        if missing:
            raise InputError(f"{dump.path / META}: {len(missing)} prompts are not in {file} ({first_of(missing)})")
    return hashes


def _by_data_set(dump: Dump) -> Identities | None:
    """(SHA-256 of the data set, prompt_idx); None where the data set is not known, or was not one."""
    sha256 = (dump.manifest.get("dataset") or {}).get("sha256")
    if not sha256 or any(isinstance(key, tuple) for key in dump.prompt_keys):
        return None
    return {key: (str(sha256), key) for key in dump.prompt_keys}
