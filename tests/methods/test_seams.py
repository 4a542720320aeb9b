"""Three other kinds of questions go through all methods, engine and report as they are: what a new task has to bring.

Each is complete below its line: an objective, and examples. Packed scores are compared with the plain forward.
"""

import json

import pytest
import torch
from torch import nn

from megaprompt.config import ProbeConfig
from megaprompt.distributed.loss_scale import NO_SCALING
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes
from megaprompt.errors import UsageError
from megaprompt.methods import chosen_methods
from megaprompt.methods.discrete import DiscretePrompt
from megaprompt.prompting.packing import PassSize
from megaprompt.run.context import RunContext
from megaprompt.run.directory import RunDirectory
from megaprompt.run.job import run_methods
from megaprompt.run.progress import ProgressFile
from megaprompt.run.results_file import ResultsFile, new_results
from megaprompt.tasks.objective import Objective
from megaprompt.tasks.task import Example, Instance, Task
from tests.conftest import PAIRS

SUBJECTS = [subject for pairs in PAIRS.values() for subject, _ in pairs]
EVERYTHING = ("manual", "in-context", "p-tuning", "best", "autoprompt", "fine-tuning", "manual+fine-tuning")


class Classes(Objective):
    """Scores [instances, classes]; what the three have in common."""

    metrics = {"accuracy": "accuracy", "macro_recall": "macro recall"}  # noqa: RUF012
    selects = ("accuracy", "macro_recall")

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def blank(self, instances):
        return {"scores": torch.zeros(instances, self.classes, dtype=torch.float64)}

    def answer(self, scores, gold):
        return {"scores": scores.double().cpu()}

    def measure(self, answers, asked):
        gold = torch.tensor([one.gold for one in asked])
        right = (answers["scores"].argmax(1) == gold).double()
        of_class = [right[gold == c].mean() for c in gold.unique()]
        return {"accuracy": right.mean().item(), "macro_recall": torch.stack(of_class).mean().item()}

    def describe(self, example, answers, i):
        answer = int(answers["scores"][i].argmax())
        text = " | ".join(example.fields.values())
        return {"input": text, "gold": example.answer, "answer": answer, "right": answer == example.gold}


def splits(examples):
    return {"train": examples, "dev": examples, "test": examples[: len(examples) // 2]}


# ------------------------------------------------------------ three classes by a word each, texts of different length


class Verbalizer(Classes):
    """A class has one token of the vocabulary."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(len(tokens))
        self.tokens = torch.tensor(tokens)

    def scores(self, outputs, head):
        return outputs.at_targets()[:, self.tokens]


def by_words(backbone) -> Task:
    words = ("Europe", "Asia", "Africa")
    examples = [
        Example({"text": " ".join(SUBJECTS[i : i + 1 + i % 9]), "question": "is in"}, words[i % 3], i % 3)
        for i in range(18)
    ]
    objective = Verbalizer(backbone.tokenization.single_tokens(words))
    return Task(
        "continent", objective, backbone.text_encoder(), splits(examples), ("text", "question"), max_tokens=16,
        manual="The capital of [text...] [question] [Y]",
    )  # fmt: skip


# ------------------------------------------------------------------ the better of two continuations of several tokens


class Continuations(Classes):
    """A candidate is as good as it is likely."""

    def __init__(self) -> None:
        super().__init__(classes=2)

    def scores(self, outputs, head):
        return outputs.by_instance(outputs.log_probabilities())


def by_likelihood(backbone) -> Task:
    examples = []
    for i, (subject, capital) in enumerate(PAIRS["P36"]):
        candidates = (f"{capital} of {subject}", "is in Peru")
        examples.append(Example({"X": subject}, capital, i % 2, candidates if i % 2 == 0 else candidates[::-1]))
    return Task(
        "choice", Continuations(), backbone.text_encoder(), splits(examples), manual="The capital of [X] is [Y] ."
    )


# ---------------------------------------------------------------------------------- a class by a head on the last token


class Head(Classes):
    """A linear layer on the hidden state."""

    reads = "hidden"

    def new_head(self, hidden_size):
        return nn.Linear(hidden_size, self.classes).double()

    def scores(self, outputs, head):
        return head(outputs.at_targets())


def by_head(backbone) -> Task:
    examples = [Example({"text": subject}, str(len(subject) % 3), len(subject) % 3) for subject in SUBJECTS]
    encoder = backbone.text_encoder()
    return Task("length", Head(3), encoder, splits(examples), ("text",), manual="The length of [text] is [Y]")


# ---------------------------------------------------------------------------------------------------- all through it


def run(make_backbone, make_task, methods, out) -> tuple[dict, RunContext]:
    backbone = make_backbone("llama")
    tasks = {task.name: task for task in [make_task(backbone)]}
    config = ProbeConfig(methods=methods, max_epochs=8, learning_rate=0.01, fine_tuning_rate=0.003, autoprompt_steps=4)
    results = new_results(backbone, tasks, World(), data="made up")
    context = RunContext(
        ResultsFile(RunDirectory(out), results, World()), ProgressFile(out), False, "made up", tasks, backbone,
        PassSize(32, 128), World(), 0,
        NO_SCALING, load=lambda trainable: (make_backbone("llama").requires_grad_(trainable), None),
        release=lambda backbone: None,
    )  # fmt: skip
    given = {name: [DiscretePrompt(task.manual), DiscretePrompt(f"{task.manual} .")] for name, task in tasks.items()}
    chosen = chosen_methods(config, tasks, {"given": given} if "manual" in methods else {}, {})
    for method in chosen:
        method.check(context)
    return run_methods(context, chosen), context


@pytest.mark.parametrize(
    ("make_task", "methods"),
    [
        pytest.param(by_words, EVERYTHING, marks=pytest.mark.slow),
        pytest.param(by_likelihood, EVERYTHING, marks=pytest.mark.slow),
        (by_head, ("p-tuning", "fine-tuning", "manual+fine-tuning")),
    ],
)
def test_another_kind_of_question(make_backbone, make_task, methods, tmp_path):
    results, context = run(make_backbone, make_task, methods, tmp_path / "run")
    [(name, task)] = context.tasks.items()
    rows = {method: found["relations"][name] for method, found in results["methods"].items()}
    assert set(rows) >= {"majority", *methods}
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions" / f"{name}.jsonl").read_text().splitlines()]
    for method in methods:
        right = [line["right"] for line in lines if line["method"] == method]
        assert len(right) == len(task.examples["test"])
        assert sum(right) / len(right) == pytest.approx(rows[method]["accuracy"])
    assert rows["fine-tuning"]["accuracy"] > rows["majority"]["accuracy"]  # train has the examples of test
    assert rows["p-tuning"]["dev_accuracy"] >= 0.5
    assert "accuracy" in (tmp_path / "run" / "report.html").read_text()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all("dev_accuracy" in line for line in log if not {"tried", "dropped"} & set(line))


def test_a_head_has_to_be_trained(make_backbone, tmp_path):
    with pytest.raises(UsageError, match="--methods manual: length is answered by a head, which has to be trained"):
        run(make_backbone, by_head, ("manual",), tmp_path / "run")


@pytest.mark.parametrize("make_task", [by_words, by_likelihood, by_head])
@pytest.mark.parametrize("size", [PassSize(16, 16), PassSize(32, 128), PassSize(None, 64)])
def test_packed_scores_and_gradients_equal_the_plain_forward(make_backbone, make_task, size):
    backbone = make_backbone("gpt2")
    task = make_task(backbone)
    fields = "".join(f"<1>[{name}...]" for name in task.fields)
    template = task.template(f"<2>{fields}<1> is [Y] ." if task.examples["train"][0].candidates else f"{fields}<2>[Y]")
    torch.manual_seed(0)
    head = task.objective.new_head(backbone.hidden_size)
    prompts = torch.randn(template.num_pseudo_tokens, backbone.hidden_size, dtype=torch.float64, requires_grad=True)
    instances = task.instances("train", template)
    at = Workplace.shared(backbone, size, World(), task.objective)
    [found] = answers(at, [Questions(instances, task.objective, head)], prompts)
    plain = torch.stack([plain_scores(backbone, task.objective, instance, prompts, head) for instance in instances])
    torch.testing.assert_close(found["scores"], plain, rtol=1e-10, atol=1e-10)

    weights = torch.full((len(instances),), 1 / len(instances), dtype=torch.float64)
    asked = [Questions(instances, task.objective, head)]
    losses = backward_passes(at, prompts, asked, weights, lambda loss, last: loss.backward())
    gold = torch.tensor([instance.gold for instance in instances])
    loss = torch.nn.functional.cross_entropy(plain, gold)
    (expected,) = torch.autograd.grad(loss, prompts)
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(prompts.grad, expected, rtol=1e-9, atol=1e-11)


def plain_scores(backbone, objective, instance: Instance, prompts, head) -> torch.Tensor:
    """One forward of the transformers model for each query, unpadded."""
    found = []
    for query in instance.queries:
        ids = torch.tensor(query.tokens)
        vectors = backbone.model.get_input_embeddings()(ids.clamp(min=0))
        vectors = torch.where((ids < 0)[:, None], prompts[(-1 - ids).clamp(min=0)], vectors)[None]
        if objective.reads == "hidden":
            return head(backbone.model.base_model(inputs_embeds=vectors)[0][0, query.targets[0]])
        logits = backbone.model(inputs_embeds=vectors).logits[0]
        if not query.labels:
            return logits[query.targets[0], objective.tokens]
        found.append(sum(logits[t].log_softmax(0)[label] for t, label in zip(query.targets, query.labels, strict=True)))
    return torch.stack(found)
