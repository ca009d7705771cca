"""What the fuzzer spoils of rollouts from elsewhere: all shapes, as JSON lines, JSON and parquet.

python tests/faults/fuzz.py --readers rollouts --seconds 600
"""

import copy
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fuzz
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from gradprobe.common.files import json_line
from gradprobe.problems.data_set import Problem
from gradprobe.rollouts.files import Vocabulary, read_rollouts

DATA = Path(__file__).parents[1] / "data" / "rollouts"
DEMO = Path(__file__).parents[2] / "demo"
IN_THE_DATA_SET: dict[str, Any] = {"problems": "the demo's"}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gradprobe": [{}, {"correct_from": "verifier"}],
    "vllm": [{}, IN_THE_DATA_SET],
    "vllm_no_seed": [{}],
    "vllm_one_seed": [{}],
    "vllm_server": [{}, IN_THE_DATA_SET],
    "llama_cpp": [{}, {"file_format": "openai"}],
    "openai_batch": [IN_THE_DATA_SET, {"correct_from": "verifier", **IN_THE_DATA_SET}],
    "openai_batch_ids": [IN_THE_DATA_SET],
    "trl": [{"correct_above": 0.5}, {"correct_from": "verifier", **IN_THE_DATA_SET}],
    "trl_chat": [{"correct_above": 0.5, "correct_from": "boxed_answer"}, {"correct_from": "verifier"}],
    "verl": [IN_THE_DATA_SET, {"correct_from": "score", "correct_above": 0.5, **IN_THE_DATA_SET}],
}
"""How each file is read; all of it is sound with these."""


def parquet_of(records: list[dict[str, Any]]) -> bytes:
    """Records as parquet, as far as arrow finds types for them."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), stream)
    return stream.getvalue()


def sound_files() -> fuzz.Files:
    """The recorded files, and each of them in the other ways to write it."""
    found = {file.name: file.read_bytes() for file in DATA.iterdir()}
    for name in list(found):
        stem, _, end = name.partition(".")
        if end == "jsonl":
            records = [json.loads(line) for line in found[name].splitlines()]
            found[f"{stem}.json"] = json.dumps(records).encode()
            found[f"{stem}.parquet"] = parquet_of(records)
        else:
            records = pq.read_table(io.BytesIO(found[name])).to_pylist()
            found[f"{stem}.jsonl"] = "".join(map(json_line, records)).encode()
    return found


def change_field(content: bytes, rng: random.Random, files: fuzz.Files) -> bytes:
    """Replace what stands under one of the names in one record; names alike, however many ids stand beside them."""
    is_table, is_list = content.startswith(b"PAR1"), content.startswith(b"[")
    try:
        if is_table:
            records = pq.read_table(io.BytesIO(content)).to_pylist()
        else:
            records = json.loads(content) if is_list else [json.loads(line) for line in content.splitlines()]
        places = [place for place in fuzz.places(rng.choice(records)) if isinstance(place[1], str)]
        name = rng.choice(sorted({name for _, name in places}))
        parent, _ = rng.choice([place for place in places if place[1] == name])
        parent[name] = copy.deepcopy(rng.choice(fuzz.VALUES))
        if is_table:
            return parquet_of(records)
        text = json.dumps(records) if is_list else "\n".join(map(json.dumps, records))
        return text.encode("utf-8", "surrogatepass")
    except Exception:  # spoilt before, or arrow has no type for it
        return content


MUTATIONS = [*fuzz.MUTATIONS, *[change_field] * 15]


def rollouts() -> fuzz.Suite:
    """Files of other tools, each read in the ways that fit it."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    vocabulary = Vocabulary(tokenizer, 350, frozenset({347, 349}), 512)
    lines = [json.loads(line) for line in (DEMO / "problems.jsonl").read_text().splitlines()[:5]]
    problems = [Problem(i, line["id"], line["prompt"], line["ground_truth"]) for i, line in enumerate(lines)]

    def reader_of(name: str, options: dict[str, Any]) -> fuzz.Reader:
        given = {**options, "problems": problems} if "problems" in options else options

        def read(directory: Path) -> None:
            for rollout in read_rollouts(directory / name, vocabulary, **given).rollouts:
                json_line(rollout.to_record()).encode("utf-8")

        read.__name__ = name
        return read

    sound = sound_files()
    readers = {name: [reader_of(name, options) for options in OPTIONS[name.partition(".")[0]]] for name in sound}

    def place(files: fuzz.Files, directory: Path) -> None:
        for name, content in files.items():
            (directory / name).write_bytes(content)

    def readers_of(names: Iterable[str]) -> list[fuzz.Reader]:
        return [reader for name in names for reader in readers[name]]

    return fuzz.Suite(sound, place, MUTATIONS, readers_of)
