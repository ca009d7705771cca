"""The numbers in an answer, as exact rationals: `1/2`, `\\frac12`, `0.5` and `50\\%` are one value."""

import re
from dataclasses import dataclass
from fractions import Fraction

# Numbers beyond these are not read at all: a response may repeat a digit to its last token, and exact powers explode.
MAX_CHARACTERS = 1000
MAX_EXPONENT = 1000

REPLACED = {
    "\u2212": "-",
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "{,}": ",",
    "\\%": "%",
    "\\$": "",
    "$": "",
    "\\,": "",
    "\\!": "",
    "\\;": "",
    "\\:": "",
    "\\times": "*",
    "\\cdot": "*",
    "×": "*",
}

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
POWER_OF_TEN = r"10\s*\^\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+)"
FRACTION = (
    rf"\\frac\s*(?:\{{\s*(?P<top>[-+]?{DECIMAL})\s*\}}|(?P<top1>\d))"
    rf"\s*(?:\{{\s*(?P<bottom>[-+]?{DECIMAL})\s*\}}|(?P<bottom1>\d))"
)
NUMBER = (
    rf"(?P<sign>[-+]?)(?:(?P<whole>\d+)?\s*{FRACTION}"
    rf"|(?:(?P<whole_plain>\d+)\s+)?(?P<over>{DECIMAL})\s*/\s*(?P<under>{DECIMAL})"
    rf"|(?P<power>{POWER_OF_TEN})"
    rf"|(?P<decimal>{DECIMAL})(?:[eE](?P<exponent>[-+]?\d+)|\s*\*\s*(?P<times>{POWER_OF_TEN}))?"
    r")\s*(?P<percent>%?)"
)
WHOLE = re.compile(NUMBER)
# In running text: not a variable's index or exponent, nor the rest of a word or of a decimal.
INSIDE = re.compile(rf"(?<![\w.^])(?<!\^\{{){NUMBER}")


@dataclass(frozen=True)
class Number:
    """An exact value; `is_percent` if a percent sign stood behind it, of which `value` knows nothing."""

    value: Fraction
    is_percent: bool = False


def read_number(text: str) -> Number | None:
    """The number that `text` is, or None where it is not a number.

    Read are whole numbers and decimals (with thousands separators `1,234`, `1{,}234`, `1\\,234`), fractions (`1/2`,
    `\\frac{1}{2}`, `\\frac12`), mixed numbers (`1\\frac{1}{2}`, `1 1/2`), scientific notation (`1.2e-3`,
    `1.2\\times10^{-3}`, `10^5`), a sign before and a percent sign behind; dollar signs are passed over.
    """
    found = WHOLE.fullmatch(re.sub(r"^([-+])\s+", r"\1", _plain(text).strip()))
    return _number_of(found) if found else None


def last_number(text: str) -> Number | None:
    """The last number in running text, or None where there is none (or it can't be had: 1/0)."""
    found = None
    for found in INSIDE.finditer(_plain(text)):  # noqa: B007
        pass
    return _number_of(found) if found else None


def same_value(a: Number, b: Number) -> bool:
    """Whether two numbers are equal, exactly.

    With a percent sign on one side only either reading counts, as in math-verify: 50% is 0.5, and the 50 of
    "how many percent".
    """
    if a.value == b.value:
        return True
    hundredfold = {(True, False): (a.value, b.value), (False, True): (b.value, a.value)}
    percent, plain = hundredfold.get((a.is_percent, b.is_percent), (Fraction(0), Fraction(1)))
    return percent == 100 * plain


def _plain(text: str) -> str:
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


def _number_of(found: re.Match[str]) -> Number | None:
    if len(found[0]) > MAX_CHARACTERS:
        return None
    try:
        value = _magnitude(found)
    except (ZeroDivisionError, OverflowError):
        return None
    return Number(-value if found["sign"] == "-" else value, bool(found["percent"]))


def _magnitude(found: re.Match[str]) -> Fraction:
    """The value without its sign.

    Raises:
        ZeroDivisionError: its denominator is 0.
        OverflowError: its power of ten is out of bounds.
    """
    if found["top"] or found["top1"]:
        fraction = _decimal(found["top"] or found["top1"]) / _decimal(found["bottom"] or found["bottom1"])
        return int(found["whole"] or 0) + fraction
    if found["over"]:
        return int(found["whole_plain"] or 0) + _decimal(found["over"]) / _decimal(found["under"])
    if found["power"]:
        return _power_of_ten(found["power"])
    times = _power_of_ten(found["times"]) if found["times"] else _power_of_ten(found["exponent"] or "0")
    return _decimal(found["decimal"]) * times


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _power_of_ten(text: str) -> Fraction:
    exponent = int(text.rpartition("^")[2].strip(" {}\t\n\r\f\v"))
    if abs(exponent) > MAX_EXPONENT:
        raise OverflowError(f"10^{exponent}")
    return Fraction(10) ** exponent
