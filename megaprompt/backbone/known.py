"""Keys and values that are known: of text in front of a row, for the model's attention to go on from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

KeysValues = tuple[tuple[Tensor, Tensor], ...]
"""Of each layer, the keys and the values of some tokens, [heads, tokens, size of a head]."""


class Known(DynamicCache):
    """What attention finds in front of the rows of one pass. The models of transformers know such an object as their
    `past_key_values`: each layer gives it the keys and values of the rows, and gets those that are to be attended to.

    Args:
        rows: for each row, what stands in front of it, in this order. Padding makes the rows equally long.
        collect: keep the keys and values of the rows themselves, for `of_row`.
    """

    def __init__(self, rows: Sequence[Sequence[KeysValues]], collect: bool = False) -> None:
        super().__init__()
        self._rows = rows
        self._lengths = [sum(part[0][0].shape[1] for part in row) for row in rows]
        self._collected: dict[int, tuple[Tensor, Tensor]] | None = {} if collect else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions in front of every row."""
        return max(self._lengths)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [R, heads, K+T, size] of a layer, given those of the rows [R, heads, T, size]."""
        if self._collected is not None:
            self._collected[layer_idx] = (key_states, value_states)
        if not any(self._lengths):
            return key_states, value_states
        return self._behind(key_states, layer_idx, 0), self._behind(value_states, layer_idx, 1)

    def _behind(self, states: Tensor, layer: int, which: int) -> Tensor:
        longest = max(self._lengths)
        parts = []
        for row, length in zip(self._rows, self._lengths, strict=True):
            parts += [part[layer][which] for part in row]
            parts.append(states.new_zeros(states.shape[1], longest - length, states.shape[3]))
        known = torch.cat(parts, dim=1).unflatten(1, (len(self._rows), longest)).transpose(0, 1)
        return torch.cat([known, states], dim=2)

    def of_row(self, row: int, positions: Tensor | None = None) -> KeysValues:
        """The keys and values of one of the rows, or of some positions [P] of it, in memory of their own."""
        assert self._collected is not None
        chosen = slice(None) if positions is None else positions.to(self._collected[0][0].device)
        return tuple(
            tuple(states[row][:, chosen].clone(memory_format=torch.contiguous_format) for states in both)  # type: ignore[misc]
            for _, both in sorted(self._collected.items())
        )
