"""A key-value cache, allocated once, on which rollouts of any length and age lie side by side.

Every step writes one column, the same in all rows. So a row's tokens are the columns from its own start to the last,
whatever its neighbours hold, and distances between columns are distances between tokens: all that causal and sliding
attention ask for. What lies before a row's start is masked.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..common.errors import InputError


class Tape(Cache):
    """Keys and values of all layers: columns `begin` .. `end` of [rows, heads, room, head dim].

    Args:
        filled: of the first prompts; it tells layers, heads and devices.
        n_rows: rollouts side by side.
        room: columns.

    Raises:
        InputError: a layer keeps something else than keys and values of every token.
    """

    def __init__(self, filled: DynamicCache, n_rows: int, room: int) -> None:
        others = {type(layer).__name__ for layer in filled.layers if type(layer) is not DynamicLayer}
        if others:
            raise InputError(f"`sampler` own: the model's cache has {', '.join(sorted(others))}, not keys and values")
        super().__init__(layers=[_TapeLayer(self, layer, n_rows, room) for layer in filled.layers])
        self.room = room
        self.begin = self.end = 0

    def place(self, filled: DynamicCache, prompt_of: torch.Tensor, rows: torch.Tensor) -> None:
        """Let each of `rows` begin with a prompt that ends where the others are; `prompt_of`: which of those filled."""
        for layer, source in zip(self.layers, filled.layers, strict=True):
            for mine, theirs in ((layer.keys, source.keys), (layer.values, source.values)):
                if mine is not None:
                    mine[rows, :, self.end - theirs.shape[2] : self.end] = theirs[prompt_of]

    def move(self, by: int) -> None:
        """Shift what is held by so many columns."""
        held, there = slice(self.begin, self.end), slice(self.begin + by, self.end + by)
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                if states is not None:
                    states[:, :, there] = states[:, :, held].clone()  # the two overlap
                    states[:, :, held.stop : there.start] = 0
        self.begin, self.end = there.start, there.stop

    def keep(self, rows: torch.Tensor) -> None:
        """Give up all rows but these."""
        held = slice(self.begin, self.end)
        for layer in self.layers:
            if layer.keys is not None:
                for states in (layer.keys, layer.values):
                    states[: len(rows), :, held] = states[:, :, held][rows]
                layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]


class _TapeLayer(DynamicLayer):
    def __init__(self, tape: Tape, filled: DynamicLayer, n_rows: int, room: int) -> None:
        super().__init__()
        self._tape = tape
        if filled.keys is not None:  # a layer that reads another's has none
            # What is masked is still multiplied, by 0. No column is read before it is written, in all rows at once:
            # the first prompts fill all of them, and so does every step.
            self.keys, self.values = (
                states.new_empty(n_rows, states.shape[1], room, states.shape[3])
                for states in (filled.keys, filled.values)
            )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; all that is held, with it."""
        tape = self._tape
        self.keys[:, :, tape.end] = key_states[:, :, 0]
        self.values[:, :, tape.end] = value_states[:, :, 0]
        held = slice(tape.begin, tape.end + 1)
        return self.keys[:, :, held], self.values[:, :, held]

    def get_seq_length(self) -> int:
        """Columns before the one that is written next."""
        return self._tape.end - self._tape.begin
