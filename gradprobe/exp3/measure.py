"""The whole of Exp 3 for dumps: where their signal sits, and whether their rollouts are the model's own."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..analysis.inputs import on_policy_by_bucket, pooled_of
from ..common.console import progress_bar
from ..dump.format import Dump, find_rollouts
from ..dump.on_policy import OnPolicy, Tokens, claims_on_policy
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
    of_all = NOT_TESTED if file is None else Tokens.of(iter_rollouts(file)).test(claims_on_policy(dump.manifest))
    return of_all, tuple(found or NOT_TESTED for found in on_policy_by_bucket(dump))
