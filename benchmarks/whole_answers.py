"""Ranking whole answers: megaprompt against the plain way, one sentence each in padded batches, in one interleaved run.

    python benchmarks/whole_answers.py DIRECTORY [--relations P36,P30] [--facts 4] [--rounds 3] [--batches 1,8,32,128]

DIRECTORY holds BEAR. Both score the same sentences (every wording, fact and answer) with the same model and threads,
and their scores are compared. The plain way is what LM Pub Quiz 0.3.3 does, written anew: the sentences of a fact and
wording are padded to the longest, `batch` at a time, and logits over the vocabulary are computed at every position.
Where `make lm-pub-quiz` has been run, the package itself is timed as well (`lm-pub-quiz`). The plain way is timed at
each of the batch sizes, and megaprompt compared with the fastest.

Prints one JSON object. Times are medians over rounds; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from megaprompt.backbone import Backbone, load_backbone
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.prompting.packing import PassSize, pack, split_into_passes
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks
from megaprompt.tasks.task import Task

PACKAGE = Path(__file__).parents[1] / ".lm-pub-quiz"


def asked(tasks: Sequence[Task]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Wording, subject and answers of every fact."""
    for task in tasks:
        for wording in task.wordings:
            for example in task.examples["test"]:
                yield wording, example.fields["X"], example.candidates


class Plain:
    """One sentence a row."""

    def __init__(self, backbone: Backbone, batch: int) -> None:
        self.model, self.tokenizer, self.batch = backbone.model, backbone.tokenization.tokenizer, batch
        self.begin = backbone.tokenization.beginning

    def __call__(self, wording: str, subject: str, candidates: Sequence[str]) -> list[float]:
        """The log-probability of each sentence behind a beginning-of-text token."""
        scores: list[float] = []
        texts = [wording.replace("[X]", subject).replace("[Y]", answer) for answer in candidates]
        for start in range(0, len(texts), self.batch):
            sentences = [text[0].upper() + text[1:] for text in texts[start : start + self.batch]]
            rows = [[self.begin, *ids] for ids in self.tokenizer(sentences, add_special_tokens=False)["input_ids"]]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            log = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            each = log.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
            scores += each.sum(1).tolist()
        return scores


def lm_pub_quiz(backbone: Backbone, batch: int) -> Callable[[str, str, Sequence[str]], list[float]] | None:
    """The package itself, if it is here."""
    if not (PACKAGE / "installed").is_file():
        return None
    sys.path.append(str(PACKAGE / "lib"))
    from lm_pub_quiz import Evaluator

    tokenizer = backbone.tokenization.tokenizer
    made = Evaluator.from_model(backbone.model, tokenizer=tokenizer, model_type="CLM", device="cpu")
    return lambda wording, subject, candidates: made.evaluate_instance(
        template=wording, subject=subject, answers=list(candidates), reduction="sum", batch_size=batch
    )


def megaprompt(backbone: Backbone, tasks: Sequence[Task], size: PassSize) -> list[float]:
    """The probability of each object among the candidates, in the order of `asked`."""
    found: list[float] = []
    for task in tasks:
        templates = [task.template(text) for text in task.wordings]
        questions = [Questions(task.instances("test", template), task.objective) for template in templates]
        at = Workplace.shared(backbone, size, World(), task.objective)
        for each in answers(at, questions, None):
            found += each["log_probability"].tolist()
    return found


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def counted(tasks: Sequence[Task], size: PassSize) -> dict[str, int]:
    """What megaprompt computes: positions of packed rows, and positions whose logits are computed."""
    count = {"positions": 0, "read": 0, "tokens of all sentences": 0}
    for task in tasks:
        instances = []
        for text in task.wordings:
            instances += task.instances("test", task.template(text))
        for indices in split_into_passes([instance.queries for instance in instances], size):
            queries = [query for i in indices for query in instances[i].queries]
            batch = pack(queries, size.row_tokens)
            count["positions"] += batch.token_ids.numel()
            count["read"] += batch.targets.numel()
            count["tokens of all sentences"] += sum(len(query.tokens) for query in queries)
    return count


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data")
    options.add_argument("--backbone", default="smollm2-135m")
    options.add_argument("--relations", default="P1376,P412,P20,P177,P103,P87")
    options.add_argument("--facts", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batches", default="1,8,32,128")
    options.add_argument("--pass-tokens", type=int, default=PassSize().pass_tokens)
    args = options.parse_args()
    torch.manual_seed(0)
    backbone, size = load_backbone(args.backbone), PassSize(pass_tokens=args.pass_tokens)
    found = lama_tasks(
        load_data(args.data), backbone, AskFor(begin=True), names=args.relations.split(","), splits=("test",),
        limit=args.facts, seed=0,
    )  # fmt: skip
    tasks = list(found.values())
    sentences = sum(len(candidates) for *_, candidates in asked(tasks))
    golds = [e.gold for task in tasks for _ in task.wordings for e in task.examples["test"]]

    runs: dict[str, Callable[[], list[float]]] = {"megaprompt": lambda: megaprompt(backbone, tasks, size)}

    def one_by_one(score: Callable[[str, str, Sequence[str]], list[float]]) -> list[float]:
        scores = [torch.tensor(score(*each), dtype=torch.float64) for each in asked(tasks)]
        return [each.log_softmax(0)[gold].item() for each, gold in zip(scores, golds, strict=True)]

    for batch in map(int, args.batches.split(",")):
        plain = Plain(backbone, batch)
        runs[f"plain, batch {batch}"] = lambda plain=plain: one_by_one(plain)
        if (package := lm_pub_quiz(backbone, batch)) is not None:
            runs[f"lm-pub-quiz, batch {batch}"] = lambda package=package: one_by_one(package)

    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(timed(lambda name=name, run=run: results.update({name: run()})))
    differences = {
        name: max(abs(a - b) for a, b in zip(values, results["megaprompt"], strict=True))
        for name, values in results.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}

    def faster(kind: str) -> float | None:
        best = min((name for name in medians if name.startswith(kind)), key=medians.__getitem__, default=None)
        if best is None:
            return None
        ratios = [a / b for a, b in zip(times[best], times["megaprompt"], strict=True)]
        return round(statistics.median(ratios), 2)

    report = {
        "backbone": args.backbone,
        "relations": [task.name for task in tasks],
        "facts": sum(len(task.examples["test"]) for task in tasks),
        "sentences": sentences,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "computed by megaprompt": counted(tasks, size),
        "sentences per second": {name: round(sentences / seconds, 1) for name, seconds in medians.items()},
        "times faster than the best plain batch": faster("plain"),
        "times faster than the best lm-pub-quiz batch": faster("lm-pub-quiz"),
        "largest difference of log-probabilities among the candidates": max(differences.values()),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
