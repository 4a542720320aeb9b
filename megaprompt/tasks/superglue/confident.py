"""COPA under a masked model: an answer's tokens are filled in one after the other, the most confident first.

A mask hides from its neighbours what they have to fit, so the likelihood of a text is not that of all its tokens masked
at once. As in the original code (PET's), each round adds the log-probability of the open token that is likeliest, puts
it in its place, and asks again for the others. Training takes all of them at once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megaprompt.tasks.objective import Answers, Outputs
from megaprompt.tasks.superglue.objectives import Likeliest

if TYPE_CHECKING:
    from megaprompt.tasks.task import Instance


class ConfidentFirst(Likeliest):
    """The candidate whose tokens are likelier together, each read when it is the most confident."""

    def blank(self, instances: int) -> Answers:
        """What one round reads of each candidate: its likeliest open `target`, by its place, and the `log_probability`
        of the token there."""
        shape = (instances, len(self.kind.labels))
        return {"target": torch.zeros(shape, dtype=torch.int64)} | super().blank(instances)

    def read(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Answers:
        log_probabilities = outputs.at_targets().log_softmax(1)
        each = log_probabilities.gather(1, outputs.labels[:, None])[:, 0].double().cpu()
        read = self.blank(len(gold))
        counts = outputs.query_of_target.bincount(minlength=len(outputs.instance_of_query)).tolist()
        places = zip(outputs.instance_of_query.tolist(), outputs.candidate_of_query.tolist(), strict=True)
        for place, of_query in zip(places, each.split(counts), strict=True):
            read["target"][place], read["log_probability"][place] = of_query.argmax(), of_query.max()
        return read

    def rounds(self, instances: Sequence[Instance]) -> Generator[Sequence[Instance], Answers, Answers]:
        """Returns the `log_probability` of each candidate [I, candidates], among the candidates."""
        sums = torch.zeros(len(instances), len(self.kind.labels), dtype=torch.float64)
        open_ = {i: dict(enumerate(one.queries)) for i, one in enumerate(instances)}
        while open_:
            read = yield [
                instances[i]._replace(queries=tuple(queries.values()), candidates=tuple(queries))
                for i, queries in open_.items()
            ]
            for row, i in enumerate(list(open_)):
                for candidate, query in list(open_[i].items()):
                    sums[i, candidate] += read["log_probability"][row, candidate]
                    k = int(read["target"][row, candidate])
                    at, label = query.targets[k], query.labels[k]
                    open_[i][candidate] = query._replace(
                        tokens=(*query.tokens[:at], label, *query.tokens[at + 1 :]),
                        targets=query.targets[:k] + query.targets[k + 1 :],
                        labels=query.labels[:k] + query.labels[k + 1 :],
                    )
                    if not open_[i][candidate].targets:
                        del open_[i][candidate]
                if not open_[i]:
                    del open_[i]
        return {"log_probability": sums.log_softmax(1)}
