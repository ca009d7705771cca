"""Make the data sets in this directory, one of each shape that `--dataset` reads: python tests/data/problems/make.py

The shapes are those of the data sets named; the problems are our own.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

HERE = Path(__file__).parent
ORIGINAL = [
    {"id": "a", "prompt": "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "ground_truth": "2", "meta": {}},
    {"id": 7, "prompt": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "ground_truth": 4, "meta": {}},
]
PLAIN = [{"question": "What is 1+1?", "answer": "2"}, {"question": "What is $\\frac{1}{2}+1$?", "answer": "3/2"}]
GSM8K = [
    {"question": "Ann has 3 apples and buys 4. How many?", "answer": "She has 3+4=<<3+4=7>>7.\n#### 7"},
    {"question": "1000 boxes of 12 and 34 more?", "answer": "1000*12=12000, and 34: 12034.\n#### 12,034"},
    {"question": "An answer that was cut off?", "answer": "First we add the"},
    {"question": None, "answer": "#### 3"},
    {"question": "No answer?", "answer": None},
]
MATH = [
    {
        "problem": "Find $x$ with $2x = 1$.",
        "level": "Level 1",
        "solution": "We get \\boxed{\\frac{1}{2}}.",
        "unique_id": "test/algebra/1.json",
    },
    {
        "problem": "Find $\\{x : x^2 = 4\\}$.",
        "level": "Level 2",
        "solution": "Both \\boxed{2}, so $\\boxed{\\{-2, 2\\}}$.",
        "unique_id": "test/algebra/2.json",
    },
]
VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"What is {i}+1? Answer in \\boxed{{}}."}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"split": "train", "index": 10 + i, "question": f"What is {i}+1?"},
    }
    for i in range(3)
]
CAPITALS = [{"ID": "2024-I-1", "Problem": "1+1?", "Answer": 2}, {"ID": "2024-I-2", "Problem": "?", "Answer": 33}]


def main() -> None:
    """Write all of them."""
    for name, records in (("original", ORIGINAL), ("plain", PLAIN), ("capitals", CAPITALS)):
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (HERE / "math.json").write_text(json.dumps(MATH, indent=1) + "\n")
    for name, records in (("gsm8k", GSM8K), ("verl", VERL)):
        pq.write_table(pa.Table.from_pylist(records), HERE / f"{name}.parquet")
    Dataset.from_list(MATH).save_to_disk(str(HERE / "saved"))
    hub = HERE / "hub"
    for config, records in (("main", GSM8K), ("short", GSM8K[:1])):
        for split in ("train", "test") if config == "main" else ("test",):
            (hub / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(records), hub / config / f"{split}-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n"
        "  - {split: train, path: main/train-*}\n  - {split: test, path: main/test-*}\n"
        "- config_name: short\n  data_files:\n  - {split: test, path: short/test-*}\n"
        "---\nThe files of a data set of the Hub, in a directory.\n"
    )


if __name__ == "__main__":
    main()
