"""What is learned for one task: the best on dev so far, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from megaprompt.backbone import Backbone
from megaprompt.tasks.objective import Objective


@dataclass
class Prompt:
    """What prompts have learned for one task: vectors [pseudo tokens, hidden size], and the head if there is one.

    Args:
        weights: those of the backbone, if they were trained and there was memory for a copy of them.
    """

    vectors: Tensor
    head: dict[str, Tensor] = field(default_factory=dict)
    weights: list[Tensor] | None = None

    def head_for(self, objective: Objective, backbone: Backbone) -> nn.Module | None:
        """The head that was trained with it, if there is one."""
        if not self.head:
            return None
        head = objective.new_head(backbone.hidden_size)
        assert head is not None
        head.load_state_dict(self.head)
        return head.to(backbone.device)


@dataclass
class Learned:
    """What training found for one task."""

    kept: Prompt | None  # of the epoch that was best on dev; None if there was none
    epochs: int  # that were trained
    best_epoch: int
    dev: dict[str, float]  # scores on dev of what was kept
    diverged: dict[str, Any] | None = None  # `step` and `reason`, if it did
    dropped: int | None = None  # the step after which other candidates were preferred, if they were


@dataclass
class Best:
    """What is best on dev so far.

    Args:
        deciding: names of scores; the first decides, the others among equals.
        first: the score that decides alone where ties count as better.
        together: the scores none of which may fall where ties are kept.
    """

    deciding: tuple[str, ...]
    first: str
    together: tuple[str, ...]
    scores: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    kept: Prompt | None = None
    stale: int = 0  # how often dev was scored since the first score got better

    @classmethod
    def of(cls, objective: Objective, examples: int) -> Best:
        """As an objective chooses on so many dev examples."""
        return cls(objective.deciding(examples), objective.selects[0], objective.together)

    def take(
        self,
        scores: Mapping[str, float],
        epoch: int,
        keep: Callable[[], Prompt],
        ties: Literal["worse", "kept", "better"],
    ) -> bool:
        """Whether these scores are better; if so, they are taken, with what `keep` gives.

        Args:
            ties: among equals the first is the best (worse); or the latest, and patience starts anew (better, as in the
                paper's code for LAMA) or does not, unless all scores got better (kept, as in its code for SuperGLUE).
        """
        if ties == "better":
            better = first_is_better = not self.scores or scores[self.first] >= self.scores[self.first]
        elif ties == "kept":
            gained = min(scores[name] - self.scores.get(name, -1.0) for name in self.together)
            better, first_is_better = gained >= 0, gained > 0
        else:
            new, old = ([those.get(name, -1.0) for name in self.deciding] for those in (scores, self.scores))
            better, first_is_better = new > old, new[0] > old[0]
        self.stale = 0 if first_is_better else self.stale + 1
        if better:
            self.scores, self.epoch, self.kept = dict(scores), epoch, keep()
        return better

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        kept = None if self.kept is None else vars(self.kept)
        return {"scores": self.scores, "epoch": self.epoch, "kept": kept, "stale": self.stale}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.scores, self.epoch, self.stale = state["scores"], state["epoch"], state["stale"]
        self.kept = None if state["kept"] is None else Prompt(**state["kept"])
