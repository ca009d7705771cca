"""Exp 3 of one dump as keys of `exp3_summary.json`."""

from dataclasses import asdict
from typing import Any

from .signal import Exp3


def summary_of(result: Exp3) -> dict[str, Any]:
    """The keys that come from the gradients; no NaN in it. The script adds `target` and `on_policy`."""
    summary = asdict(result)
    buckets = summary.pop("buckets")
    return summary | {"per_bucket": {str(index): numbers for index, numbers in enumerate(buckets)}}
