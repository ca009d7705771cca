r"""Make the study's problems: `supervised.parquet` and `training.parquet` for train.py, `problems.parquet` held out.

Arithmetic with a few small numbers, five kinds, each asked in several wordings. No numbers (mirrored ones counted as
the same) stand twice, in one file or in two: a held-out question is no training question in other words.

    python make_problems.py              # the three files beside this script
    python make_problems.py --out DIR

Columns: `id`, `problem`, `answer`, as `--dataset` of the toolkit reads them (docs/problems.md), and `kind`;
`supervised.parquet` has a worked `solution` too, whose way and words are drawn anew for each problem.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SEED = 16
SUPERVISED, TRAINING, HELD_OUT = "supervised.parquet", "training.parquet", "problems.parquet"
ROWS_PER_KIND = {SUPERVISED: 200, TRAINING: 160, HELD_OUT: 80}

Numbers = tuple[int, ...]
Step = tuple[str, int]
Row = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of problem; every function takes the problem's numbers.

    `key` is what mirrored problems share; `ways` are the honest ways to the answer, each a list of (expression, value).
    """

    draw: Callable[[random.Random], Numbers]
    fits: Callable[..., bool]
    key: Callable[..., Numbers]
    wordings: tuple[str, ...]
    answer: Callable[..., int]
    ways: Callable[..., list[list[Step]]]


def ways_of_sum(a: int, b: int) -> list[list[Step]]:
    tens, ones = a // 10 * 10, a % 10
    return [
        [(f"{a}+{b}", a + b)],
        [(f"{b}+{a}", a + b)],
        [(f"{ones}+{b}", ones + b), (f"{tens}+{ones + b}", a + b)],
    ]


def ways_of_difference(a: int, b: int) -> list[list[Step]]:
    ones = a % 10
    direct, over_ten = [(f"{a}-{b}", a - b)], [(f"{a}-{ones}", a - ones), (f"{a - ones}-{b - ones}", a - b)]
    return [direct, over_ten] if 0 < ones < b else [direct]


def ways_of_product(a: int, b: int) -> list[list[Step]]:
    tens, ones = a // 10 * 10, a % 10
    parts = [(f"{tens}*{b}", tens * b), (f"{ones}*{b}", ones * b)]
    return [
        [(f"{a}*{b}", a * b)],
        [*parts, (f"{tens * b}+{ones * b}", a * b)],
        [*parts[::-1], (f"{ones * b}+{tens * b}", a * b)],
    ]


def ways_of_chain(a: int, b: int, c: int) -> list[list[Step]]:
    forwards = [(f"{a}+{b}", a + b), (f"{a + b}-{c}", a + b - c)]
    minus_first = [(f"{b}-{c}", b - c), (f"{a}+{b - c}", a + b - c)]
    return [forwards, minus_first] if b >= c else [forwards]


def ways_of_product_and_sum(a: int, b: int, c: int) -> list[list[Step]]:
    product, total = (f"{a}*{b}", a * b), a * b + c
    return [[product, (f"{a * b}+{c}", total)], [product, (f"{c}+{a * b}", total)]]


KINDS = {
    "sum": Kind(
        draw=lambda r: (r.randint(11, 99), r.randint(2, 9)),
        fits=lambda a, b: a % 10 > 0,
        key=lambda a, b: (a, b),
        wordings=("What is {0} + {1}?", "Add {0} and {1}.", "I have {0} apples and get {1} more. How many are there?"),
        answer=lambda a, b: a + b,
        ways=ways_of_sum,
    ),
    "difference": Kind(
        draw=lambda r: (r.randint(11, 99), r.randint(2, 9)),
        fits=lambda a, b: True,
        key=lambda a, b: (a, b),
        wordings=("What is {0} - {1}?", "Take {1} from {0}.", "Of {0} birds {1} fly away. How many stay?"),
        answer=lambda a, b: a - b,
        ways=ways_of_difference,
    ),
    "product": Kind(
        draw=lambda r: (r.randint(11, 79), r.randint(2, 9)),
        fits=lambda a, b: a % 10 > 0,
        key=lambda a, b: (a, b),
        wordings=("What is {0} * {1}?", "Multiply {0} by {1}.", "How many nuts are in {1} bags of {0}?"),
        answer=lambda a, b: a * b,
        ways=ways_of_product,
    ),
    "chain": Kind(
        draw=lambda r: (r.randint(2, 12), r.randint(2, 9), r.randint(2, 9)),
        fits=lambda a, b, c: a + b > c,
        key=lambda a, b, c: (a, b, c),
        wordings=("What is {0} + {1} - {2}?", "Ann has {0} coins, finds {1} and loses {2}. How many has she?"),
        answer=lambda a, b, c: a + b - c,
        ways=ways_of_chain,
    ),
    "product_and_sum": Kind(
        draw=lambda r: (r.randint(2, 9), r.randint(2, 9), r.randint(2, 19)),
        fits=lambda a, b, c: True,
        key=lambda a, b, c: (min(a, b), max(a, b), c),
        wordings=("What is {0} * {1} + {2}?", "There are {0} boxes of {1} pens and {2} more. How many pens?"),
        answer=lambda a, b, c: a * b + c,
        ways=ways_of_product_and_sum,
    ),
}

OPENERS = ("", "", "First ", "We have ", "Well, ")
CONNECTORS = (", then ", ". Next ", " and ", ", now ")
CLOSERS = (r", so \boxed{%d}.", r". The answer is \boxed{%d}.", r". That makes \boxed{%d}.", r". Hence \boxed{%d}.")


def worked_solution(kind: Kind, numbers: Numbers, rng: random.Random) -> str:
    """One honest solution; the free choices of way and words leave a model that learns from them uncertain there."""
    text = rng.choice(OPENERS)
    for place, (expression, value) in enumerate(rng.choice(kind.ways(*numbers))):
        text += (rng.choice(CONNECTORS) if place else "") + f"{expression}={value}"
    return text + rng.choice(CLOSERS) % kind.answer(*numbers)


def fresh_numbers(kind: Kind, count: int, rng: random.Random) -> list[Numbers]:
    """The numbers of `count` problems, no two with the same key."""
    chosen: dict[Numbers, Numbers] = {}
    while len(chosen) < count:
        numbers = kind.draw(rng)
        if kind.fits(*numbers):
            chosen.setdefault(kind.key(*numbers), numbers)
    return list(chosen.values())


def row_of(name: str, numbers: Numbers, with_solution: bool, rng: random.Random) -> Row:
    """One problem as a row, without its id."""
    kind = KINDS[name]
    row = {"problem": rng.choice(kind.wordings).format(*numbers), "answer": str(kind.answer(*numbers)), "kind": name}
    if with_solution:
        row["solution"] = worked_solution(kind, numbers, rng)
    return row


def make_files() -> dict[str, list[Row]]:
    """The rows of each file, shuffled; a function of `SEED` alone."""
    rng = random.Random(SEED)
    files: dict[str, list[Row]] = {file: [] for file in ROWS_PER_KIND}
    for name, kind in KINDS.items():
        numbers = iter(fresh_numbers(kind, sum(ROWS_PER_KIND.values()), rng))
        for file, count in ROWS_PER_KIND.items():
            files[file] += [row_of(name, next(numbers), file == SUPERVISED, rng) for _ in range(count)]
    for file, rows in files.items():
        rng.shuffle(rows)
        files[file] = [{"id": f"{Path(file).stem}-{place:04d}", **row} for place, row in enumerate(rows)]
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="directory of the three files (default: this script's)")
    out = parser.parse_args().out
    for file, rows in make_files().items():
        pq.write_table(pa.Table.from_pylist(rows), out / file)
        print(f"{file}: {len(rows)} problems")


if __name__ == "__main__":
    main()
