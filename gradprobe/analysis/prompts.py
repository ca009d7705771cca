"""Which prompts of two dumps are the same: told by what a prompt is, not by where it stands in a data set."""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..common.errors import InputError, first_of
from ..dump.format import META, Dump, find_rollouts, prompt_hashes_of
from ..dump.records import PromptKey, iter_rollouts, prompt_hash

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

    Two prompts of one dump with the same ids (a problem that stands twice in a data set) are paired in the order of
    their `prompt_idx`.

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


def _by_hash(dump: Dump) -> Identities | None:
    """(hash, k) of the k-th prompt with that hash, from the manifest, else from the rollouts; None without either."""
    hashes, file = prompt_hashes_of(dump.manifest), find_rollouts(dump.path)
    if hashes is None and file is not None:
        hashes = {rollout.prompt_idx: prompt_hash(rollout.prompt_ids) for rollout in iter_rollouts(file)}
        missing = [key for key in dump.prompt_keys if key not in hashes]
        if missing:
            raise InputError(f"{dump.path / META}: {len(missing)} prompts are not in {file} ({first_of(missing)})")
    return None if hashes is None else dict(_counted(sorted(hashes.items())))


def _counted(hashes: Iterable[tuple[PromptKey, str]]) -> Iterable[tuple[PromptKey, tuple[str, int]]]:
    seen: Counter[str] = Counter()
    for key, value in hashes:
        yield key, (value, seen[value])
        seen[value] += 1


def _by_data_set(dump: Dump) -> Identities | None:
    """(SHA-256 of the data set, prompt_idx); None where the data set is not known, or was not one."""
    sha256 = (dump.manifest.get("dataset") or {}).get("sha256")
    if not sha256 or any(isinstance(key, tuple) for key in dump.prompt_keys):
        return None
    return {key: (str(sha256), key) for key in dump.prompt_keys}
