"""A key-value cache, allocated once, on which rollouts of any prompt lie side by side.

Every step writes one column, the same in all rows. So a row's tokens are the columns from its own start to the last,
and distances between columns are distances between tokens: all that causal and sliding attention ask for. What lies
before a row's start is masked.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..common.errors import InputError


class KeyValues(Cache):
    """Keys and values of all layers: columns `begin` .. `end` of [rows, heads, room, head dim].

    It begins with those of the prompts, `filled`, padded on the left, of which each row has one: `prompt_of`, [rows].
    """

    def __init__(self, filled: DynamicCache, prompt_of: torch.Tensor, room: int) -> None:
        others = {type(layer).__name__ for layer in filled.layers if type(layer) is not DynamicLayer}
        if others:
            raise InputError(f"`sampler` own: the model's cache has {', '.join(sorted(others))}, not keys and values")
        super().__init__(layers=[_Layer(self, layer, prompt_of, room) for layer in filled.layers])
        self.begin, self.end = 0, filled.get_seq_length()

    def keep(self, rows: torch.Tensor) -> None:
        """Give up all rows but these."""
        held = slice(self.begin, self.end)
        for layer in self.layers:
            if layer.keys is not None:
                for states in (layer.keys, layer.values):
                    states[: len(rows), :, held] = states[:, :, held][rows.to(states.device)]
                layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]


class _Layer(DynamicLayer):
    def __init__(self, of: KeyValues, filled: DynamicLayer, prompt_of: torch.Tensor, room: int) -> None:
        super().__init__()
        self._of = of
        # Else transformers looks whether the mask could be left out, and waits for the device at every step.
        self.is_compileable = not prompt_of.is_cpu
        if filled.keys is not None:  # a layer that reads another's has none
            self.keys, self.values = (_widened(states, prompt_of, room) for states in (filled.keys, filled.values))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; all that is held, with it."""
        end = self._of.end
        self.keys[:, :, end] = key_states[:, :, 0]
        self.values[:, :, end] = value_states[:, :, 0]
        held = slice(self._of.begin, end + 1)
        return self.keys[:, :, held], self.values[:, :, held]

    def get_seq_length(self) -> int:
        """Columns before the one that is written next."""
        return self._of.end - self._of.begin


def _widened(states: torch.Tensor, prompt_of: torch.Tensor, room: int) -> torch.Tensor:
    """[prompts, heads, columns, head dim] -> [rows, heads, room, head dim]; no column is read before it is written."""
    found = states.new_empty(len(prompt_of), states.shape[1], room, states.shape[3])
    found[:, :, : states.shape[2]] = states[prompt_of.to(states.device)]
    return found
