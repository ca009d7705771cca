"""Other verdicts for a dump's rollouts: its labels and counts become theirs, its gradients stay as they are.

Rewards were of those who judged before, and go: Exp 3 would weigh by them and not by the verdicts.

The new files are written into a directory of their own and named in a list, and then take their places. A call that was
cut off before the list was written has changed nothing; one that was cut off after it is finished by the next.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common import files
from ..common.errors import InputError, raise_if_any
from ..common.files import iter_jsonl, make_directory, read_json, sha256_of, write_json
from . import format as contract
from .consistency import checksum_problems, load_manifest
from .records import PromptKey, Rollout, prompt_key_from_json, write_records

STAGED, LIST = ".relabelled", "list.json"


def rollouts_of(path: Path) -> tuple[list[Path], Path]:
    """The dumps of a directory's targets, and the rollouts that they share, all unchanged since they were written.

    What an earlier call left is finished first.
    """
    _put_in_place(path / STAGED)
    directories = contract.target_directories(path)
    manifests = [load_manifest(directory) for directory in directories]
    file = contract.find_rollouts(directories[0])
    if file is None:
        raise InputError(f"{path}: no {contract.ROLLOUTS} in it; without the responses nothing can be judged anew")
    if file.parent != path:
        raise InputError(
            f"{path}: shares its rollouts with other targets; name the directory of all of them, {file.parent}"
        )
    # Lines get new checksums, which must not bless a change; the gradients keep theirs.
    found = (checksum_problems(*of, content=None) for of in zip(directories, manifests, strict=True))
    raise_if_any(dict.fromkeys(problem for of_one in found for problem in of_one))
    return directories, file


def relabel(directories: list[Path], file: Path, rollouts: Sequence[Rollout], verifier: Any) -> None:
    """Write verdicts into `rollouts.jsonl`, every target's `meta.jsonl` and manifest, and `settings.json`.

    Args:
        directories, file: of `rollouts_of`.
        rollouts: all of the file, `correct` as they are judged now.
        verifier: what manifests say of it.
    """
    verdicts = {(rollout.prompt_idx, rollout.sample_idx): rollout.correct for rollout in rollouts}
    staged = file.with_name(STAGED)
    make_directory(staged)
    places: dict[str, str] = {}

    def new(place: Path) -> Path:
        name = str(len(places))
        places[name] = str(place.relative_to(file.parent))
        return staged / name

    judged = new(file)
    write_records(judged, (replace(rollout, reward=None) for rollout in rollouts))
    hashes = {contract.ROLLOUTS: sha256_of(judged)}
    for directory in directories:
        meta = new(directory / contract.META)
        files.write_jsonl(meta, _relabelled_lines(directory / contract.META, verdicts))
        old = load_manifest(directory)
        manifest = _judged_by(old, verifier) | {"num_correct_rollouts": sum(verdicts.values())}
        manifest["judged_before"] = [*old.get("judged_before", []), _verdicts_of(old)]
        manifest["checksums"] = {**old.get("checksums", {}), **hashes, contract.META: sha256_of(meta)}
        write_json(new(directory / contract.MANIFEST), manifest)
    settings = file.with_name(contract.SETTINGS)
    asked = read_json(settings) if settings.exists() else {}
    if "model" in asked:  # a merged dump's names targets only
        write_json(new(settings), _judged_by(asked, verifier))
    write_json(staged / LIST, {"places": places})
    _put_in_place(staged)


def _put_in_place(staged: Path) -> None:
    """Finish what is listed, and take the rest away."""
    if not staged.exists():
        return
    if (staged / LIST).exists():
        for name, place in read_json(staged / LIST)["places"].items():
            if (staged / name).exists():
                files.replace(staged / name, staged.parent / place)
    shutil.rmtree(staged)


def _relabelled_lines(meta: Path, verdicts: Mapping[tuple[PromptKey, int], bool]) -> Iterator[dict[str, Any]]:
    for number, line in iter_jsonl(meta):
        key = prompt_key_from_json(line.get("prompt_idx")), line.get("sample_idx")
        if key not in verdicts:
            raise InputError(f"{meta}:{number}: its rollout is not in {contract.ROLLOUTS}")
        yield {name: value for name, value in line.items() if name != "reward"} | {"correct": verdicts[key]}


def _judged_by(record: dict[str, Any], verifier: Any) -> dict[str, Any]:
    """A manifest or settings that name another verifier: where rollouts were sampled, or where they came from."""
    if "rollouts_from" not in record:
        return record | {"sampling": (record.get("sampling") or {}) | {"verifier": verifier}}
    origin = record["rollouts_from"]
    judged = {"verifier": verifier, "correct_from": "verifier", "correct_above": None, "verdict_from": "verifier"}
    return record | {"rollouts_from": origin | judged | {"n_to_verify": origin.get("n_rollouts")}}


def _verdicts_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Who judged before, and how many rollouts were correct."""
    origin = manifest.get("rollouts_from") or manifest.get("sampling") or {}
    keys = ("verifier", "correct_from", "correct_above")
    counts = {"num_correct_rollouts": manifest.get("num_correct_rollouts")}
    return {key: origin[key] for key in keys if key in origin} | counts
