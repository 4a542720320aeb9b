"""SuperGLUE: megaprompt against the original's way, in one interleaved run on a causal model.

    python benchmarks/superglue.py [--data DIR] [--rounds 3] [--reference-batch 2] [--backbone smollm2-135m]
                                   [--training "RTE,CB,MultiRC,MultiRC grouped"] [--evaluation MultiRC,COPA,WSC]

The texts are made up, with lengths as SuperGLUE's have (medians and 95 % quantiles of each field), or FewGLUE's of DIR.
Both ways have the same learned prompts, threads and tokens. What the original does, written anew:

- every query is a row of its own, padded to the maximum length (MultiRC 512, RTE, CB, BoolQ and WiC 256, WSC 128,
  COPA 96), with logits of the whole vocabulary at every position; MultiRC has a query for each answer
- a step takes a batch of 16: AdamW on the prompt encoder and, where the model is tuned, on all weights, clipped
- COPA and WSC are evaluated one by one, with a pass for each token of an answer

Rows of the original do not depend on each other, so it is timed on --reference-batch examples, forward and backward,
and the step of its optimizers once; a whole step is computed from both. megaprompt takes whole steps. Learning rates
are 0, so that all is timed on the same weights; losses and answers of both are compared.

Training examples are few-shot ones. With the model frozen, their trunks are computed in the first step, which is not
timed but told. "MultiRC grouped" is with --grouped: answers to a question follow each other.

Prints one JSON object: examples per second, medians over rounds; how many times faster, the median of the ratios
within a round; and the share of the rate of a large matrix product that megaprompt's steps reach, counting only the
tokens that it computes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaprompt.backbone import Backbone, load_backbone
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.engine.trainer import Trainer
from megaprompt.engine.weights import Weights
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.tasks.superglue.objectives import Verbalizer
from megaprompt.tasks.superglue.patterns import read_patterns
from megaprompt.tasks.superglue.reading import read_superglue
from megaprompt.tasks.superglue.recipes import paper_tuning
from megaprompt.tasks.superglue.tasks import superglue_tasks
from megaprompt.tasks.superglue.written import Written, mean_the_same
from megaprompt.tasks.task import Instance, Task

SIZE = PassSize(row_tokens=1024)
EVALUATED = 104  # examples of megaprompt's evaluation, at most: as many as WSC has
GROUPED = "MultiRC grouped"

# ------------------------------------------------------------------------------------------------------- made-up texts

LENGTHS = {  # words: median, 95 % quantile, most
    "passage": (86, 194, 230), "question": (8, 11, 17), "premise": (31, 112, 170), "hypothesis": (8, 18, 41),
    "CB": (48, 120, 203), "COPA": (6, 9, 13), "choice": (5, 8, 11), "MultiRC": (265, 400, 430), "asked": (10, 20, 43),
    "answer": (3, 15, 40), "sentence": (7, 14, 27), "text": (18, 54, 80), "span": (1, 3, 4),
}  # fmt: skip
TEXT = """the a of to in and that was he she they it had for on with his her at by from were said when who which into
    city people water school country year house river company children morning government president mountain found
    played wrote bought after before because while under between often never almost great small early famous broken
    green quiet several"""
WORDS = TEXT.split()


class MadeUp:
    """Writes files in SuperGLUE's format."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.wsc: list[str] = []  # the text of the question before

    def words(self, kind: str) -> list[str]:
        median, late, most = LENGTHS[kind]
        length = round(self.random.lognormvariate(log(median), log(late / median) / 1.645))
        return self.random.choices(WORDS, k=min(max(1, length), most))

    def text(self, kind: str) -> str:
        return " ".join(self.words(kind))

    def row(self, task: str, i: int, questions: int) -> dict[str, Any]:
        match task:
            case "BoolQ":
                return {"passage": self.text("passage"), "question": self.text("question"), "label": i % 2 == 0}
            case "CB":
                label = ("entailment", "contradiction", "neutral")[i % 3]
                return {"premise": self.text("CB"), "hypothesis": self.text("hypothesis"), "label": label}
            case "COPA":
                choices = {f"choice{n}": self.text("choice") for n in (1, 2)}
                return {"premise": self.text("COPA"), **choices, "question": ("cause", "effect")[i % 2], "label": i % 2}
            case "MultiRC":
                return {"passage": {"text": self.text("MultiRC"), "questions": self.questions(questions)}}
            case "RTE":
                label = ("entailment", "not_entailment")[i % 2]
                return {"premise": self.text("premise"), "hypothesis": self.text("hypothesis"), "label": label}
            case "WiC":
                sentences = {f"sentence{n}": self.text("sentence") for n in (1, 2)}
                return {"word": self.random.choice(WORDS), **sentences, "label": i % 2 == 0}
            case _:
                text, span = self.words("text"), self.words("span")
                if self.random.random() < 41 / 104 or not self.wsc:  # there are 41 texts
                    self.wsc = text
                start = self.random.randrange(max(1, len(self.wsc) - len(span)))
                span = self.wsc[start : start + len(span)]
                target = {"span1_text": " ".join(span), "span1_index": start, "span2_text": "it"}
                target |= {"span2_index": len(self.wsc)}
                return {"text": " ".join([*self.wsc, "it", "ran"]), "target": target, "label": i % 3 > 0}

    def questions(self, count: int) -> list[dict[str, Any]]:
        return [
            {
                "idx": q,
                "question": self.text("asked"),
                "answers": [{"idx": a, "text": self.text("answer"), "label": a % 2} for a in range(5)],
            }
            for q in range(count)
        ]

    def write(self, root: Path, tasks: Sequence[str]) -> None:
        for task in tasks:
            (root / task).mkdir(parents=True)
            for split, count in (("train", 32), ("dev32", 1), ("val", EVALUATED if task != "MultiRC" else 2)):
                rows = [{"idx": i, **self.row(task, i, 1 if split == "train" else 11)} for i in range(count)]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (root / task / f"{split}.jsonl").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the original's way


class Original:
    """One query a row, padded to the maximum; logits at every position."""

    def __init__(self, backbone: Backbone, task: Task, width: int) -> None:
        self.backbone, self.task, self.width = backbone, task, width

    def logits(self, queries: Sequence[Query], prompts: Tensor) -> Tensor:
        """[queries, width, vocabulary]."""
        rows = [[*query.tokens, *[0] * (self.width - len(query.tokens))] for query in queries]
        ids = torch.tensor(rows)
        mask = torch.tensor([[1] * len(q.tokens) + [0] * (self.width - len(q.tokens)) for q in queries])
        vectors = self.backbone.model.get_input_embeddings()(ids.clamp(min=0))
        for row, query in enumerate(queries):  # as in the original, token by token
            for position, token in enumerate(query.tokens):
                if token < 0:
                    vectors[row, position] = prompts[-1 - token]
        return self.backbone.model(inputs_embeds=vectors, attention_mask=mask, use_cache=False).logits

    def losses(self, instances: Sequence[Instance], prompts: Tensor) -> Tensor:
        """Of each instance, whose answer is a word."""
        objective = self.task.objective
        assert isinstance(objective, Verbalizer)
        queries = [query for each in instances for query in each.queries]
        logits = self.logits(queries, prompts)
        rows = torch.stack([logits[i, query.targets[0]] for i, query in enumerate(queries)])
        return cross_entropy(rows[:, objective.tokens], torch.tensor([i.gold for i in instances]), reduction="none")

    @torch.no_grad()
    def answer(self, instance: Instance, prompts: Tensor) -> int:
        """COPA and WSC with a pass for each token; classes with one."""
        objective = self.task.objective
        if isinstance(objective, Verbalizer):
            [query] = instance.queries
            return int(self.logits([query], prompts)[0, query.targets[0], objective.tokens].argmax())
        if isinstance(objective, Written):
            return self.written(instance, objective, prompts)
        sums = []
        for query in instance.queries:
            each = zip(query.targets, query.labels, strict=True)
            found = (
                self.logits([Query(query.tokens[: at + 1], (at,))], prompts)[0, at].log_softmax(0)[label]
                for at, label in each
            )
            sums.append(sum(found, torch.zeros(())))
        return int(torch.stack(sums).argmax())

    def written(self, instance: Instance, objective: Written, prompts: Tensor) -> int:
        assert instance.given is not None
        tokens, written = list(instance.queries[0].tokens), []
        for _ in range(objective.tokens_to_write(instance.given)):
            at = len(tokens) - 1
            written.append(int(self.logits([Query(tuple(tokens), (at,))], prompts)[0, at].argmax()))
            tokens.append(written[-1])
        return int(mean_the_same(self.backbone.tokenization.tokenizer.decode(written), instance.given))


# ------------------------------------------------------------------------------------------------------------ measured


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = do()
    return time.perf_counter() - start, found


class Case:
    """One kind of step or evaluation: `original` and `ours` each give examples per second."""

    def __init__(self, name: str, original: Callable[[], float], ours: Callable[[], float]) -> None:
        self.name, self.original, self.ours = name, original, ours
        self.rates: list[tuple[float, float]] = []
        self.about: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        one, other = (statistics.median(rates) for rates in zip(*self.rates, strict=True))
        ratio = statistics.median(ours / original for original, ours in self.rates)
        return {"original": round(one, 3), "megaprompt": round(other, 3), "times faster": round(ratio, 1), **self.about}


def training(
    backbone: Backbone, name: str, task: Task, width: int, weights: Weights | None, batch: int, peak: float
) -> Case:
    """Steps with the model frozen, or tuned if there are weights."""
    template = task.template(task.learned or "")
    train = task.training_instances(template)
    recipe = replace(paper_tuning(task.name, "few-shot").prompts, learning_rate=0.0, dropout=False)
    recipe, step = replace(recipe, grouped=name == GROUPED), recipe.batch_size
    backbone.requires_grad_(weights is not None)
    data = TrainingSet(task.name, task.objective, template.num_pseudo_tokens, train, train[:1])
    trainer = Trainer(backbone, [data], recipe, size=SIZE, world=World(), weights=weights)
    [learner] = trainer.learners
    original = Original(backbone, task, width)
    trained = [*learner.parameters, *(backbone.parameters() if weights else ())]

    def optimizers() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in (learner.optimizer, weights and weights.optimizer):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def originally() -> float:
        backbone.requires_grad_(weights is not None)
        chosen = random.Random(len(case.rates)).sample(train, batch)
        assert learner.encoder is not None
        encoder = learner.encoder
        seconds, _ = timed(lambda: original.losses(chosen, encoder()).mean().backward())
        once, _ = timed(optimizers)
        return step / (seconds * step / batch + once)

    def ours() -> float:
        backbone.requires_grad_(weights is not None)
        steps = 1 if weights else 4
        before = trainer.at.trunks.counts["tokens"]
        seconds = sum(timed(full_step)[0] for _ in range(steps))
        tokens = trainer.at.trunks.counts["tokens"] - before
        parameters = sum(p.numel() for p in backbone.model.base_model.parameters())
        done = tokens * 2 * parameters * (3 if weights else 2)  # forward; gradients of activations, and of weights
        case.about |= {"tokens a step": tokens // steps, "share of the matrix product": round(done / seconds / peak, 2)}
        return steps * step / seconds

    def full_step() -> None:
        if learner.cursor + step > len(train):  # the last batch of an epoch would not be full
            learner.epoch, learner.cursor = learner.epoch + 1, 0
        trainer.train_step()

    case = Case(f"training {'tuned' if weights else 'frozen'}, {name}", originally, ours)
    if weights is None:
        case.about["seconds of the first step"] = round(timed(full_step)[0], 2)
        case.about["tokens of trunks"] = trainer.at.trunks.counts["trunk_tokens"]
    compare_losses(original, learner.encoder, trainer.at, train[:batch])  # also warms up
    return case


@torch.no_grad()
def compare_losses(original: Original, encoder: Any, at: Workplace, instances: Sequence[Instance]) -> None:
    objective, prompts = original.task.objective, encoder()
    found = answers(at, [Questions(instances, objective)], prompts)[0]["log_probability"]
    ours = -found[range(len(instances)), [each.gold for each in instances]]
    plain = original.losses(instances, prompts).double()
    if not torch.allclose(ours, plain, rtol=1e-3, atol=1e-4):
        sys.exit(f"{original.task.name}: losses differ: {ours.tolist()} and {plain.tolist()}")


def evaluation(backbone: Backbone, task: Task, width: int, batch: int) -> Case:
    template: Template = task.template(task.learned or "")
    asked = task.instances("test", template)[:EVALUATED]
    torch.manual_seed(0)
    prompts = torch.randn(template.num_pseudo_tokens, backbone.hidden_size) * backbone.embedding_statistics.spread
    original = Original(backbone, task, width)
    said: list[int] = []

    def originally() -> float:
        start = len(case.rates) * batch
        chosen = [(start + i) % len(asked) for i in range(batch)]
        seconds, found = timed(lambda: [original.answer(asked[i], prompts) for i in chosen])
        if said and found != [said[i] for i in chosen]:
            sys.exit(f"{task.name}: answers differ: {found} and {[said[i] for i in chosen]}")
        return batch / seconds

    def ours() -> float:
        backbone.requires_grad_(False)
        at = Workplace.shared(backbone, SIZE, World(), task.objective)
        seconds, [found] = timed(lambda: answers(at, [Questions(asked, task.objective)], prompts))
        said[:] = task.objective.said(found).tolist()  # type: ignore[attr-defined]
        return len(asked) / seconds

    case = Case(f"evaluation, {task.name}", originally, ours)
    case.about["examples"] = len(asked)
    return case


def matrix_product() -> float:
    """Floating-point operations a second of a large one, the best of some."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(timed(lambda: a @ a)[0] for _ in range(8))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="smollm2-135m")
    options.add_argument("--data", type=Path)
    options.add_argument("--training", default=f"RTE,CB,MultiRC,{GROUPED}")
    options.add_argument("--evaluation", default="MultiRC,COPA,WSC")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--reference-batch", type=int, default=2)
    args = options.parse_args()

    backbone = load_backbone(args.backbone)
    if not backbone.causal:
        sys.exit(f"{args.backbone}: the original's way is written for causal models; give one")
    trained, evaluated = (text.split(",") if text else [] for text in (args.training, args.evaluation))
    names = sorted({*(name.split(maxsplit=1)[0] for name in trained), *evaluated})
    with tempfile.TemporaryDirectory() as made_up:
        root = args.data or Path(made_up)
        if args.data is None:
            MadeUp(0).write(root, names)
        data = read_superglue(root, "few-shot", names)
    patterns = read_patterns(None)
    tasks = {name: task.way("learned") for name, task in superglue_tasks(data, patterns, backbone).items()}
    peak, batch = matrix_product(), args.reference_batch
    cases = []
    weights = Weights(backbone, replace(paper_tuning(names[0], "few-shot").weights, learning_rate=0.0), World(), None)
    for tuned in (None, weights):
        for name in trained if tuned else (each for each in trained if each != GROUPED):
            task = tasks[name.split(maxsplit=1)[0]]
            cases.append(training(backbone, name, task, patterns[task.name].max_tokens, tuned, batch, peak))
    cases += [evaluation(backbone, tasks[name], patterns[name].max_tokens, batch) for name in evaluated]
    for _ in range(args.rounds):
        for case in cases:
            ours = case.ours()
            case.rates.append((case.original(), ours))
    report = {"backbone": args.backbone, "threads": torch.get_num_threads(), "rounds": args.rounds}
    report |= {"texts": str(args.data or "made up"), "matrix product, GFLOP/s": round(peak / 1e9)}
    print(json.dumps(report | {case.name: case.report() for case in cases}, indent=2))


if __name__ == "__main__":
    main()
