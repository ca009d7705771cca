"""Feed spoilt files to the readers: whatever is in a file, the only answer is an `InputError` that names it.

    python tests/faults/fuzz.py --seconds 600 --seed 1

Every case is a pure function of the seed and its number. A crash is printed, its files are kept under --keep, and
`--seed SEED --only NUMBER` runs it alone. Exit status 1 if there was one.
"""

import argparse
import copy
import json
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from gradprobe.common.console import printable
from gradprobe.common.errors import InputError
from gradprobe.common.files import json_line
from gradprobe.dump.check import problems_of
from gradprobe.dump.format import load_dump, load_manifest
from gradprobe.dump.records import iter_rollouts
from gradprobe.problems.data_set import load_problems

SLOW_SECONDS = 5.0
N_PROMPTS, N_SAMPLES, N_TOKENS, DIM, BINS = 3, 2, 4, 5, 2
PROBLEMS, ROLLOUTS, MANIFEST, META, GRADS = (
    "problems.jsonl", "rollouts.jsonl", "manifest.json", "meta.jsonl", "grads.npy",
)  # fmt: skip

Files = dict[str, bytes]
Mutation = Callable[[bytes, random.Random, Files], bytes]
Reader = Callable[[Path], None]


def sound_files() -> Files:
    """A dump with its rollouts, and a data set; sound as they stand."""
    rng = np.random.default_rng(0)
    rollouts, positions = [], []
    for prompt in range(N_PROMPTS):
        for sample in range(N_SAMPLES):
            entropies = rng.random(N_TOKENS).tolist()
            rollout = {"prompt_idx": prompt, "sample_idx": sample, "problem_id": f"p{prompt}", "prompt_ids": [1, 2]}
            rollout |= {"response_ids": [5, 6, 7, 8], "entropies": entropies, "logprobs": [-0.5, -1.0, -0.25, -2.0]}
            rollout |= {"response": "\\boxed{3} ≈ π", "ground_truth": "3", "correct": sample == 0}
            rollouts.append(rollout)
            positions += [
                {"row": len(positions) + pos, "prompt_idx": prompt, "sample_idx": sample, "pos": pos}
                | {"bin": int(entropies[pos] >= 0.5), "entropy": entropies[pos], "correct": sample == 0}
                | {"token_id": 5 + pos, "logprob": rollout["logprobs"][pos]}
                for pos in range(N_TOKENS)
            ]
    n = len(positions)
    manifest = {
        "model_path": "models/base", "target": "model.layers.1.mlp.down_proj.weight", "row_idx": 0, "row_dim": DIM,
        "num_prompts": N_PROMPTS, "num_samples_per_prompt": N_SAMPLES, "num_rollouts": len(rollouts),
        "num_positions": n, "entropy_edges": [0.0, 0.5, 1.0], "entropy_edges_over": "response_tokens", "bins": BINS,
        "seed": 0, "num_correct_rollouts": 3, "prompt_idxs": [0, 1, 2], "num_response_tokens": n, "format_version": 1,
        "shard": {"index": 0, "num_shards": 1}, "dataset": {"path": "p.jsonl", "sha256": "0"}, "checksums": {},
        "nonfinite_rows": [], "zero_rows": [3], "seconds": {"total": 1.5},
    }  # fmt: skip
    grads = rng.standard_normal((n, DIM)).astype("<f4")
    grads[3] = 0
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {DIM}), }}".ljust(117) + "\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + grads.tobytes()
    problems = [{"id": f"p{i}", "prompt": f"1+{i}=", "ground_truth": str(1 + i), "meta": {}} for i in range(3)]
    return {
        GRADS: npy,
        MANIFEST: json.dumps(manifest, indent=2).encode(),
        "settings.json": json.dumps({"targets": ["dump"], "seed": 0}).encode(),
        **{
            name: "".join(map(json_line, records)).encode()
            for name, records in ((META, positions), (ROLLOUTS, rollouts), (PROBLEMS, problems))
        },
    }


# Ways to spoil a file

FRAGMENTS = [
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf4\x90\x80\x80", b"\xe2\x80\xa8", b"\\ud800", b"\\u0000"),
    *(b"\n", b"\r", b"\r\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"-", b"e999", b"NaN", b"Infinity"),
    *(b"null", b"{}", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"1e-999", b"-0", b"\x1b[31m", b"/*", b"True"),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", "0", "1", "a", "\ud800", "\x00", "\x1b[31m\n", "../..", "/", ".", "x" * 10_000, "нет", "\U0001f600"),
    *([], [[]], [0], [0, 1], [0, -1], [None], ["a"], [0.5], [True], [10**400], {}, {"a": 1}, {"": {}}, {"path": 1}),
]


def deep_list(depth: int) -> list:
    """Lists inside of each other."""
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    return nested


def flip_bits(content: bytes, rng: random.Random, files: Files) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random, files: Files) -> bytes:
    return content[: rng.randint(0, len(content))]


def cut_out(content: bytes, rng: random.Random, files: Files) -> bytes:
    start, stop = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:start] + content[stop:]


def repeat(content: bytes, rng: random.Random, files: Files) -> bytes:
    start, stop = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:stop] + content[start:]


def splice(content: bytes, rng: random.Random, files: Files) -> bytes:
    other, at = rng.choice(sorted(files.values())), rng.randint(0, len(content))
    start, stop = sorted(rng.randint(0, len(other)) for _ in range(2))
    return content[:at] + other[start:stop] + content[at:]


def insert(content: bytes, rng: random.Random, files: Files) -> bytes:
    at = rng.randint(0, len(content))
    new = rng.choice(FRAGMENTS) if rng.random() < 0.7 else rng.randbytes(rng.randint(1, 20))
    return content[:at] + new + content[at + rng.choice((0, 0, len(new))) :]


def change_number(content: bytes, rng: random.Random, files: Files) -> bytes:
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    if not digits:
        return content
    at = rng.choice(digits)
    number = rng.choice((b"0", b"1", b"9", b"-1", b"1e400", b"123456789012345678901", b"0.5", b"1.", b"007"))
    return content[:at] + number + content[at + 1 :]


def shuffle_lines(content: bytes, rng: random.Random, files: Files) -> bytes:
    lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def change_json(content: bytes, rng: random.Random, files: Files) -> bytes:
    """Delete, rename, swap or replace what stands at a random place of one JSON object."""
    lines = [content] if content.startswith(b"{\n") else content.splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    try:
        record = json.loads(lines[at])
    except (ValueError, IndexError, RecursionError):
        return content
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_place(record, rng)
    lines[at] = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return b"\n".join(lines) + b"\n"


def _change_place(record: Any, rng: random.Random) -> None:
    found = list(places(record))
    if not found:
        return
    parent, key = rng.choice(found)
    how = rng.random()
    if how < 0.2:
        del parent[key]
    elif how < 0.3 and isinstance(parent, dict):
        parent[rng.choice(("", "row", "bin", "targets", "x", "\ud800"))] = parent.pop(key)
    elif how < 0.4:
        other, other_key = rng.choice(found)
        parent[key] = json.loads(json.dumps(other[other_key]))
    elif how < 0.45:
        parent[key] = deep_list(rng.choice((3, 100, 300)))
    elif how < 0.55:
        parent[key] = str(parent[key])
    elif how < 0.6:
        parent[key] = [parent[key]]
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside of nested JSON."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from places(node[key])


MUTATIONS: list[Mutation] = [
    *(flip_bits, truncate, cut_out, repeat, splice, insert, insert, change_number, shuffle_lines),
    *[change_json] * 6,
]


def spoilt(files: Files, rng: random.Random, mutations: Sequence[Mutation]) -> Files:
    """Some of `files`, spoilt in some ways."""
    changed: Files = {}
    for name in rng.sample(sorted(files), rng.choice((1, 1, 1, 2))):
        content = files[name]
        for _ in range(rng.choice((1, 1, 2, 3))):
            content = rng.choice(mutations)(content, rng, files)
        changed[name] = content
    return changed


# The readers


def read_dump(directory: Path) -> None:
    """Load a dump; what was taken must be fit to be written again."""
    for record in load_dump(directory / "dump").meta_records():
        json_line(record).encode("utf-8")


def read_manifest(directory: Path) -> None:
    json.dumps(load_manifest(directory / "dump"), allow_nan=False, ensure_ascii=False).encode("utf-8")


def read_rollouts(directory: Path) -> None:
    for rollout in iter_rollouts(directory / ROLLOUTS):
        json_line(rollout.__dict__).encode("utf-8")


def read_problems(directory: Path) -> None:
    load_problems(directory / PROBLEMS)


def read_everything(directory: Path) -> None:
    problems, _ = problems_of(directory / "dump")
    if problems:
        raise InputError(*problems)


READERS = (read_dump, read_manifest, read_rollouts, read_problems, read_everything)


@dataclass(frozen=True)
class Suite:
    """What is fuzzed: sound files by name, how they are put into a directory and spoilt, who reads them.

    Attributes:
        readers_of: those that read any of the files of these names.
    """

    sound: Files
    place: Callable[[Files, Path], None]
    mutations: Sequence[Mutation]
    readers_of: Callable[[Iterable[str]], Sequence[Reader]]


@dataclass
class Tally:
    """What came of the cases so far: how each reader ended, and the crashes."""

    outcomes: Counter
    crashes: list[str]
    n_cases: int = 0


def read(reader: Callable[[Path], None], directory: Path) -> str:
    """How the reader ended: "taken" or "refused".

    Raises:
        Exception: the reader crashed, took long, or its message doesn't say where or can't be printed.
    """
    start = time.process_time()
    try:
        reader(directory)
        outcome = "taken"
    except InputError as error:
        outcome, message = "refused", str(error)
        printable(message).encode("utf-8")
    assert outcome == "taken" or str(directory) in message, f"says not where: {message}"
    assert time.process_time() - start < SLOW_SECONDS, "slow"
    return outcome


def place(files: Files, directory: Path) -> None:
    """Write the files where readers look for them: the rollouts and settings stand above their dump."""
    for name, content in files.items():
        above = name in (PROBLEMS, ROLLOUTS, "settings.json")
        (directory / name if above else directory / "dump" / name).write_bytes(content)


def dumps() -> Suite:
    """A dump, its rollouts and a data set; all readers read all of them."""
    return Suite(sound_files(), place, MUTATIONS, lambda names: READERS)


def run_case(number: int, seed: int, suite: Suite, directory: Path, keep: Path, tally: Tally) -> None:
    """One case: spoil, read by every reader, mend."""
    changed = spoilt(suite.sound, random.Random(f"{seed}-{number}"), suite.mutations)
    suite.place(changed, directory)
    tally.n_cases += 1
    for reader in suite.readers_of(changed):
        try:
            tally.outcomes[f"{reader.__name__} {read(reader, directory)}"] += 1
        except Exception:
            kept = keep / f"seed{seed}-{number}"
            shutil.copytree(directory, kept, dirs_exist_ok=True)
            report = f"--seed {seed} --only {number} {reader.__name__}: files in {kept}\n{traceback.format_exc()}"
            tally.crashes.append(report)
            print(report.encode("ascii", "backslashreplace").decode(), flush=True)
    suite.place({name: suite.sound[name] for name in changed}, directory)


def fuzz(
    seed: int,
    keep: Path,
    seconds: float = math.inf,
    cases: float = math.inf,
    first: int = 0,
    suite_of: Callable[[], Suite] = dumps,
) -> Tally:
    """Run case after case until `seconds` are over or `cases` are done."""
    tally, suite = Tally(Counter(), []), suite_of()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        directory = Path(name)
        (directory / "dump").mkdir()
        suite.place(suite.sound, directory)
        for reader in suite.readers_of(suite.sound):
            assert read(reader, directory) == "taken", f"the files must be sound at first: {reader.__name__}"
        while tally.n_cases < cases and time.monotonic() < end:
            run_case(first + tally.n_cases, seed, suite, directory, keep, tally)
    return tally


def main() -> int:
    """Fuzz, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this one case")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_crashes"), help="where files that crash a reader go")
    args = parser.parse_args()
    one = {} if args.only is None else {"cases": 1, "first": args.only}
    tally = fuzz(args.seed, args.keep, seconds=args.seconds, **one)
    print(f"{tally.n_cases} cases, {len(tally.crashes)} crashes")
    for outcome, n in sorted(tally.outcomes.items()):
        print(f"  {outcome}: {n}")
    return 1 if tally.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
