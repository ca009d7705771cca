"""The whole of Exp 3 for dumps: where their signal sits, and whether their rollouts are the model's own."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..analysis.inputs import pooled_of
from ..common.console import progress_bar
from ..dump.format import Dump, find_rollouts
from ..dump.on_policy import OnPolicy, Tokens, claims_on_policy, is_chosen_by_prefix
from ..dump.records import iter_rollouts
from .signal import Exp3, signal_of_pooled

NOT_TESTED = OnPolicy(None, None, None)


@dataclass(frozen=True)
class DumpSignal:
    """Exp 3 of one dump.

    Attributes:
        signal: all that comes from its gradients.
        on_policy: of all response tokens; without numbers where no `rollouts.jsonl` tells of them.
        on_policy_by_bucket: of each bucket's; without numbers too where the rule looks at the tokens drawn.
    """

    signal: Exp3
    on_policy: OnPolicy
    on_policy_by_bucket: tuple[OnPolicy, ...]


def refusal(dump: Dump) -> str | None:
    """Why Exp 3 can't read a dump; None where it can."""
    return None if dump.is_pooled else "a dump of single tokens; Exp 3 reads pooled ones (`pool` bucket)"


def measure_dumps(
    dumps: Mapping[str, list[Dump]], objective: str = "dapo"
) -> tuple[dict[str, DumpSignal], dict[str, list[Exp3]]]:
    """Of each tag, all of its first target, and what the gradients of its others say. `objective`: as of `weights`."""
    found: dict[str, DumpSignal] = {}
    others: dict[str, list[Exp3]] = {}
    with progress_bar("Exp 3", sum(map(len, dumps.values())), "dumps") as bar:

        def measured(dump: Dump) -> Exp3:
            result = signal_of_pooled(pooled_of(dump), objective)
            bar.update()
            return result

        for tag, (first, *rest) in dumps.items():
            found[tag] = DumpSignal(measured(first), *on_policy_of(first))
            others[tag] = list(map(measured, rest))
    return found, others


def on_policy_of(dump: Dump) -> tuple[OnPolicy, tuple[OnPolicy, ...]]:
    """The test of all response tokens, and of those of each bucket."""
    file = find_rollouts(dump.path)
    if file is None:
        return NOT_TESTED, (NOT_TESTED,) * dump.bins
    tokens, is_claimed = Tokens.of(iter_rollouts(file)), claims_on_policy(dump.manifest)
    by_bucket = [NOT_TESTED] * dump.bins
    if is_chosen_by_prefix(dump.manifest):
        edges = np.asarray(dump.manifest["entropy_edges"], dtype=np.float64)
        by_bucket = tokens.test_by_bucket(edges, is_claimed)
    return tokens.test(is_claimed), tuple(by_bucket)
