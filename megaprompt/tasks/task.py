"""What is to be learned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megaprompt.prompting.template import Query


@dataclass(frozen=True)
class Examples:
    """Queries and the token ids of their objects."""

    queries: list[Query]
    objects: list[int]

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Task:
    """One relation to learn. Its queries number their pseudo tokens from 0."""

    relation: str
    num_pseudo_tokens: int
    train: Examples
    dev: Examples
    vectors: Tensor | None = None  # [pseudo tokens, hidden size] to start with, without a prompt encoder
