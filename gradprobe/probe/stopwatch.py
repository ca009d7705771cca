"""Seconds by phase, for the manifest."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds by phase, over all runs that a probe took."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to phase `name`."""
        start = time.perf_counter()
        yield
        self.add({name: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was spent elsewhere, or by an earlier run."""
        for name, value in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + value, 3)

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """What the phases have taken since they stood at `before`."""
        return {name: round(value - before.get(name, 0.0), 3) for name, value in self.seconds.items()}

    def total(self) -> dict[str, float]:
        """All phases asked for so far, and the time since the start."""
        return {**self.seconds, "total": round(time.perf_counter() - self.started, 3)}
