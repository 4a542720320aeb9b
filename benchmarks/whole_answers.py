"""Ranking whole answers: megaprompt against LM Pub Quiz in one interleaved run.

    python benchmarks/whole_answers.py DIRECTORY [--relations P20,P103] [--facts 8] [--plain-facts 1] [--rounds 3]

DIRECTORY holds BEAR. The same model and threads score the sentences of every wording, fact and answer: megaprompt all
of them, what the rank of the object needs (`rank`), and what exact P@1 needs (`best`). LM Pub Quiz 0.3.3 is timed where
`make lm-pub-quiz` has been run, else the same written anew (`plain`): the sentences of a fact and wording are padded to
the longest, `batch` at a time, and logits over the vocabulary are computed at every position. It scores fact by fact,
so its speed does not depend on how many there are, and it is timed on the first facts of each relation alone; there,
scores are compared. megaprompt is compared with the fastest of the batch sizes.

Prints one JSON object. Times are medians over rounds; ratios are medians of the ratios within a round. A share of the
peak is what the multiplications of the model's matrices reach of what one large product reaches beside them.
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
from typing import Any, get_args

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from megaprompt.backbone import Backbone, load_backbone
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.prompting.packing import PassSize
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.search import Needs
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


def megaprompt(backbone: Backbone, tasks: Sequence[Task], size: PassSize) -> tuple[list[Answers], int]:
    """The answers of each wording of each task, and how many tokens were computed."""
    found: list[Answers] = []
    tokens = 0
    for task in tasks:
        templates = [task.template(text) for text in task.wordings]
        questions = [Questions(task.instances("test", template), task.objective) for template in templates]
        at = Workplace.shared(backbone, size, World(), task.objective)
        found += answers(at, questions, None)
        tokens += at.trunks.counts["tokens"]
    return found, tokens


def peak() -> float:
    """Multiplications and additions per second in one large matrix product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    return 8 * 2 * 1024**3 / timed(lambda: [a @ b for _ in range(8)])


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def operations(backbone: Backbone, tasks: Sequence[Task], tokens: int) -> float:
    """Of the matrices, where all is scored: of the layers at each token, and of the output layer where it is read."""
    head = backbone.model.get_output_embeddings().weight
    embeddings = {id(p): p.numel() for p in (head, backbone.model.get_input_embeddings().weight)}
    layers = sum(p.numel() for p in backbone.parameters()) - sum(embeddings.values())
    read = 0
    for task in tasks:
        for text in task.wordings:
            queries = [query for one in task.instances("test", task.template(text)) for query in one.queries]
            read += len({query.tokens[: target + 1] for query in queries for target in query.targets})
    return 2.0 * layers * tokens + 2.0 * head.numel() * read


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data")
    options.add_argument("--backbone", default="smollm2-135m")
    options.add_argument("--relations", default="P1376,P412,P20,P177,P103,P87")
    options.add_argument("--facts", type=int, default=8)
    options.add_argument("--plain-facts", type=int, default=1)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batches", default="1,8,32,128")
    options.add_argument("--pass-tokens", type=int, default=PassSize().pass_tokens)
    args = options.parse_args()
    torch.manual_seed(0)
    backbone, size = load_backbone(args.backbone), PassSize(pass_tokens=args.pass_tokens)
    data, names = load_data(args.data), args.relations.split(",")

    def tasks_of(needs: Needs, facts: int) -> list[Task]:
        ask_for = AskFor(begin=True, needs=needs)
        return list(lama_tasks(data, backbone, ask_for, names=names, splits=("test",), limit=facts, seed=0).values())

    tasks = {needs: tasks_of(needs, args.facts) for needs in get_args(Needs)}
    few = tasks_of("all", args.plain_facts)
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {
        needs: lambda part=part: megaprompt(backbone, part, size) for needs, part in tasks.items()
    }
    for batch in map(int, args.batches.split(",")):
        package = lm_pub_quiz(backbone, batch)
        name, score = ("plain", Plain(backbone, batch)) if package is None else ("lm-pub-quiz", package)
        runs[f"{name}, batch {batch}"] = lambda score=score: [score(*each) for each in asked(few)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = []
    for _ in range(args.rounds):
        peaks.append(peak())
        for name, run in runs.items():
            times[name].append(timed(lambda name=name, run=run: results.update({name: run()})))

    sentences = {name: sum(len(c) for *_, c in asked(tasks.get(name, few))) for name in runs}
    speeds = {name: [sentences[name] / seconds for seconds in values] for name, values in times.items()}
    others = [name for name in runs if name not in tasks]
    best = max(others, key=lambda name: statistics.median(speeds[name]))
    golds = [e.gold for task in few for _ in task.wordings for e in task.examples["test"]]
    ours, _ = megaprompt(backbone, few, size)
    own = [value for each in ours for value in each["log_probability"].tolist()]
    theirs = [
        torch.tensor(scores, dtype=torch.float64).log_softmax(0)[gold].item()
        for scores, gold in zip(results[best], golds, strict=True)
    ]
    tokens = {needs: results[needs][1] for needs in tasks}
    work = operations(backbone, tasks["all"], tokens["all"])
    report = {
        "backbone": args.backbone,
        "relations": names,
        "facts": {needs: sum(len(task.examples["test"]) for task in part) for needs, part in tasks.items()},
        "facts of the other": sum(len(task.examples["test"]) for task in few),
        "sentences": sentences,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "tokens computed": tokens,
        "share of the peak, all": round(
            statistics.median(work / s / p for s, p in zip(times["all"], peaks, strict=True)), 2
        ),
        "sentences per second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        f"times faster than {best}": {
            needs: round(statistics.median(a / b for a, b in zip(speeds[needs], speeds[best], strict=True)), 2)
            for needs in tasks
        },
        "the same P@1": all(
            torch.equal(a["rank"] == 1, b["rank"] == 1)
            for needs in ("rank", "best")
            for a, b in zip(results["all"][0], results[needs][0], strict=True)
        ),
        "largest difference of log-probabilities among the candidates": max(
            abs(a - b) for a, b in zip(own, theirs, strict=True)
        ),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
