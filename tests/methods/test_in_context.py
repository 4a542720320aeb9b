"""Demonstrations come from train only, the choice is made on dev, and what was chosen can be asked again."""

import json

import pytest
import torch

from megaprompt.cli import main
from megaprompt.distributed.loss_scale import NO_SCALING
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.methods.in_context import InContext, chosen_demonstrations
from megaprompt.methods.untrained import Wording, choose, drawn, readable
from megaprompt.prompting.packing import PassSize
from megaprompt.run.context import RunContext
from megaprompt.run.directory import RunDirectory
from megaprompt.run.progress import ProgressFile
from megaprompt.run.results_file import ResultsFile, new_results
from megaprompt.run.saved_prompts import load_prompts
from megaprompt.tasks.task import Example, Task
from tests.conftest import PAIRS, TEMPLATES, objective_of, plain_logits, write_facts


def task_of(backbone, train=6, repeat=1) -> Task:
    pairs = PAIRS["P36"]
    gold = backbone.tokenization.single_tokens([answer for _, answer in pairs])
    examples = [Example({"X": s}, o, g) for (s, o), g in zip(pairs, gold, strict=True)]
    splits = {"train": examples[:train], "dev": examples[train:] * repeat, "test": examples[train:]}
    return Task("P36", objective_of(backbone), backbone.text_encoder(), splits, manual=TEMPLATES["P36"])


def context_of(backbone, task, out) -> RunContext:
    tasks = {task.name: task}
    return RunContext(
        ResultsFile(RunDirectory(out), new_results(backbone, tasks, World(), data="made up"), World()),
        ProgressFile(out), False, "made up", tasks, backbone, PassSize(64, 256), World(), 0, NO_SCALING,
        load=None, release=None,
    )  # fmt: skip


def test_draws_are_nested_repeatable_and_differ(make_backbone):
    task = task_of(make_backbone())
    assert drawn(task, 4, 0, seed=0) == drawn(task, 4, 0, seed=0)
    assert drawn(task, 4, 0, seed=0)[-2:] == drawn(task, 2, 0, seed=0)
    assert len({drawn(task, 4, draw, seed) for draw in range(3) for seed in range(3)}) > 5
    assert all(set(drawn(task, 6, draw, 0)) == set(range(6)) for draw in range(3))


def test_a_question_behind_demonstrations_is_one_text(make_backbone):
    backbone = make_backbone()
    task = task_of(backbone)
    shown = drawn(task, 2, 0, 0)
    before = Wording(task.manual_template, shown).before(task)
    first, second = (task.examples["train"][i] for i in shown)
    assert before == (
        f"The capital of {first.fields['X']} is {first.answer} .\nThe capital of {second.fields['X']} is "
        f"{second.answer} .\n"
    )
    [query] = task.instance(task.examples["test"][0], task.manual_template, before).queries
    whole = before + f"The capital of {task.examples['test'][0].fields['X']} is"
    assert list(query.tokens) == backbone.tokenization.tokenizer(whole)["input_ids"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_answers_equal_the_plain_forward(make_backbone, kind):
    backbone = make_backbone(kind)
    task = task_of(backbone)
    instances = task.instances("test", task.manual_template, Wording(task.manual_template, (2, 0)).before(task))
    at = Workplace.shared(backbone, PassSize(40, 80), World(), task.objective)
    [found] = answers(at, [Questions(instances, task.objective)], None)
    logits = plain_logits(
        backbone, [one.queries[0] for one in instances], torch.zeros(1, backbone.hidden_size).double()
    )
    gold = torch.tensor([one.gold for one in instances])
    expected = logits.log_softmax(1).gather(1, gold[:, None])[:, 0]
    torch.testing.assert_close(found["log_probability"], expected, rtol=1e-10, atol=1e-10)


def test_the_best_on_dev_is_chosen_and_its_score_is_that_of_all_of_dev(make_backbone, tmp_path):
    """Seven dev examples repeated, so that there are several rungs, all of which agree."""
    backbone = make_backbone()
    task = task_of(backbone, repeat=32)
    context = context_of(backbone, task, tmp_path)
    wordings = [Wording(task.manual_template, drawn(task, k, draw, 0)) for k in (0, 1, 2) for draw in range(2)]
    tried = choose(context, task, wordings)
    assert sorted(map(id, wordings)) == sorted(id(each.wording) for each in tried)
    whole = {}
    for each in wordings:
        found = context.answer(task, each.template, "dev", before=each.before(task))
        whole[each] = context.measure(task, "dev", found)
    assert tried[0].examples == len(task.examples["dev"])
    assert tried[0].dev == pytest.approx(whole[tried[0].wording])
    assert tried[-1].examples < tried[0].examples
    best = max((scores["p_at_1"], scores["mrr"]) for scores in whole.values())
    assert tried[0].dev["p_at_1"] >= best[0] - 0.05


def test_demonstrations_that_do_not_fit_are_not_tried(make_backbone, tmp_path):
    backbone = make_backbone()  # has 64 positions
    task = task_of(backbone)
    context = context_of(backbone, task, tmp_path)
    tried = chosen_demonstrations(context, task)
    assert {each.wording.about["demonstrations"] for each in tried} == {0, 1, 4}
    backbone.model.config.max_position_embeddings = 30
    assert {each.wording.about["demonstrations"] for each in chosen_demonstrations(context, task)} == {0, 1}
    long = Wording(task.manual_template, tuple(range(6)))
    assert readable(context, task, [long, Wording(task.manual_template)]) == [Wording(task.manual_template)]


def test_only_train_is_shown_and_evaluate_and_ask_use_what_was_chosen(backbone_directory, tmp_path, capsys):
    pairs = [(f"{a} {b}", capital) for (a, capital), (b, _) in zip(PAIRS["P36"], PAIRS["P36"][1:], strict=False)]
    splits = {"train": pairs[:6], "dev": pairs[6:9], "test": pairs[9:]}
    for split, facts in splits.items():
        write_facts(tmp_path / "data" / "trex" / split / "P36.jsonl", facts)
    (tmp_path / "data" / "relations.jsonl").write_text(
        json.dumps({"relation": "P36", "template": TEMPLATES["P36"], "label": "capital", "type": "1-1"}) + "\n"
    )
    run = tmp_path / "run"
    options = ["--backbone", str(backbone_directory), "--data", str(tmp_path / "data"), "--out", str(run)]
    assert main(["probe", *options, "--methods", "in-context"]) == 0
    row = json.loads((run / "results.json").read_text())["methods"]["in-context"]["relations"]["P36"]
    prompt = load_prompts(run)["P36"]
    lines = prompt.before.splitlines()
    assert len(lines) == row["demonstrations"] == len(row["shown"])
    assert all(any(f"The capital of {s} is {o} ." == line for s, o in splits["train"]) for line in lines)
    deciding = [(each["mrr"], each["p_at_1"]) for each in row["tried"] if each["dev_examples"] == 3]
    assert deciding == sorted(deciding, reverse=True)  # few dev facts

    assert main(["evaluate", "--prompts", str(run), "--out", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["relations"]["P36"]["p_at_1"] == row["p_at_1"]
    capsys.readouterr()
    assert main(["ask", "--prompts", str(run), splits["test"][0][0], "--top", "3"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    predictions = [json.loads(line) for line in (run / "predictions" / "P36.jsonl").read_text().splitlines()]
    assert (
        first.split("%")[1].strip() == next(p for p in predictions if p["subject"] == splits["test"][0][0])["top"][0][0]
    )
    assert main(["ask", "--prompts", str(run), "--method", "best", "Peru"]) == 2
    assert "--method best: " in capsys.readouterr().err


def test_it_needs_a_manual_prompt(make_backbone, tmp_path):
    backbone = make_backbone()
    task = task_of(backbone)
    without = Task("P36", task.objective, task.encoder, task.examples)
    with pytest.raises(Exception, match="P36 has no manual prompt"):
        InContext().check(context_of(backbone, without, tmp_path))
