"""The tasks on tiny models, causal and masked: scores, losses and written answers against plain forwards."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Query
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.patterns import read_patterns
from megaprompt.tasks.superglue.reading import read_superglue
from megaprompt.tasks.superglue.tasks import superglue_tasks
from megaprompt.tasks.superglue.written import mean_the_same
from tests.tasks.superglue.made_up import write_superglue

SIZE = PassSize(64, 128)
CLASSES = ("BoolQ", "CB", "MultiRC", "RTE", "WiC")


def logits_of(backbone: Backbone, query: Query, prompts: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] of one plain forward."""
    ids = torch.tensor(query.tokens)
    vectors = backbone.model.get_input_embeddings()(ids.clamp(min=0))
    vectors = torch.where((ids < 0)[:, None], prompts[(-1 - ids).clamp(min=0)], vectors)
    return backbone.model(inputs_embeds=vectors[None]).logits[0]


def asked(backbone, task, instances, prompts, head=None):
    at = Workplace.shared(backbone, SIZE, World(), task.objective)
    return answers(at, [Questions(instances, task.objective, head)], prompts)[0]


def losses(backbone, task, instances, prompts, head=None):
    at = Workplace.shared(backbone, SIZE, World(), task.objective)
    weights = torch.full((len(instances),), 1 / len(instances), dtype=torch.float64)
    questions = [Questions(instances, task.objective, head)]
    return backward_passes(at, prompts, questions, weights, lambda loss, last: loss.backward())


def learned(backbone, task):
    """The task as learned prompts ask it, with vectors for its pseudo tokens."""
    task = task.way("learned")
    template = task.template(task.learned)
    torch.manual_seed(0)
    vectors = torch.randn(template.num_pseudo_tokens, backbone.hidden_size, dtype=torch.float64)
    return task, template, vectors.requires_grad_()


@pytest.mark.parametrize("name", CLASSES)
def test_classes_by_their_words(make_tasks, backbone, name):
    task, template, vectors = learned(backbone, make_tasks(backbone)[name])
    instances = task.instances("train", template)
    words = [read_patterns(None)[name].learned.words[answer] for answer in KINDS[name].answers]
    tokens = [backbone.tokenization.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(each) == 1 for each in tokens)
    columns = [each[0] for each in tokens]
    plain = torch.stack(
        [logits_of(backbone, i.queries[0], vectors)[i.queries[0].targets[0], columns] for i in instances]
    )
    found = asked(backbone, task, instances, vectors)
    torch.testing.assert_close(found["log_probability"], plain.log_softmax(1), rtol=1e-9, atol=1e-9)
    loss = cross_entropy(plain, torch.tensor([i.gold for i in instances]))
    (expected,) = torch.autograd.grad(loss, vectors)
    assert losses(backbone, task, instances, vectors).mean().item() == pytest.approx(loss.item())
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-8, atol=1e-11)


@torch.no_grad()
def confident_first(backbone, instances, vectors) -> torch.Tensor:
    """[instances, candidates]: one plain forward for each token, the likeliest open one is filled in."""
    sums = torch.zeros(len(instances), 2, dtype=torch.float64)
    for i, instance in enumerate(instances):
        for candidate, query in enumerate(instance.queries):
            tokens, open_ = list(query.tokens), dict(zip(query.targets, query.labels, strict=True))
            while open_:
                rows = logits_of(backbone, query._replace(tokens=tuple(tokens)), vectors).log_softmax(1)
                at = max(open_, key=lambda at: rows[at, open_[at]].item())
                sums[i, candidate] += rows[at, open_[at]]
                tokens[at] = open_.pop(at)
    return sums


def test_the_likelier_choice_with_a_margin_for_each_example(make_tasks, backbone):
    task, template, vectors = learned(backbone, make_tasks(backbone)["COPA"])
    instances = task.instances("train", template)
    sums = torch.stack([
        torch.stack([
            sum(
                logits_of(backbone, query, vectors)[at].log_softmax(0)[label]
                for at, label in zip(query.targets, query.labels, strict=True)
            )
            for query in instance.queries
        ])
        for instance in instances
    ])  # fmt: skip
    decode = backbone.tokenization.tokenizer.decode
    for example, instance in zip(task.examples["train"], instances, strict=True):
        texts = tuple(decode(list(query.labels)).strip() for query in instance.queries)
        assert texts == example.candidates, "no words behind them"
    found = asked(backbone, task, instances, vectors)
    if not backbone.causal:
        answered = confident_first(backbone, instances, vectors)
        assert (answered - sums).abs().max() > 0.01, "all at once is something else"
    else:
        answered = sums
    torch.testing.assert_close(found["log_probability"], answered.log_softmax(1), rtol=1e-9, atol=1e-9)
    gold = torch.tensor([i.gold for i in instances])
    right, wrong = (sums.gather(1, each[:, None])[:, 0] for each in (gold, 1 - gold))
    expected = (1 + wrong - right).clamp(min=0)
    torch.testing.assert_close(losses(backbone, task, instances, vectors), expected.detach(), rtol=1e-9, atol=1e-9)


def test_wsc_is_learned_from_true_statements(make_tasks, backbone):
    task, template, vectors = learned(backbone, make_tasks(backbone)["WSC"])
    instances = task.training_instances(template)
    assert len(instances) == sum(example.gold for example in task.examples["train"]) == 4
    expected = []
    for instance in instances:
        [query] = instance.queries
        assert backbone.tokenization.tokenizer.decode(list(query.labels)).strip().startswith("The ")
        rows = logits_of(backbone, query, vectors)[list(query.targets)]
        expected.append(cross_entropy(rows, torch.tensor(query.labels)))
    torch.testing.assert_close(losses(backbone, task, instances, vectors), torch.stack(expected).detach())


def test_masked_models_learn_that_spare_masks_stay_empty(make_tasks, backbone):
    """They have one when they are asked."""
    task, template, _ = learned(backbone, make_tasks(backbone)["WSC"])
    right = [example.given for example in task.examples["train"] if example.gold]
    pad, spare = backbone.tokenization.tokenizer.pad_token_id, []
    for instance, text in zip(task.training_instances(template), right, strict=True):
        [query] = instance.queries
        tokens = backbone.tokenization.encode([f" {text}"], is_start=False)[0]
        spare.append(len(query.targets) - len(tokens))
        assert list(query.labels) == tokens + [pad] * spare[-1]
        if not backbone.causal:
            first, last = query.targets[0], query.targets[-1]
            assert query.targets == tuple(range(first, last + 1))
            assert {query.tokens[at] for at in query.targets} == {backbone.tokenization.tokenizer.mask_token_id}
    assert set(spare) == {0} if backbone.causal else 0 < max(spare) <= 3


def test_wsc_is_written_token_by_token(make_tasks, backbone):
    """The most confident open position first; a causal model has only the next."""
    task, template, vectors = learned(backbone, make_tasks(backbone)["WSC"])
    instances = task.instances("test", template)
    found = asked(backbone, task, instances, vectors)
    for i, instance in enumerate(instances):
        [query] = instance.queries
        given = backbone.tokenization.encode([f" {instance.given}"], is_start=False)[0]
        tokens, open_, written = list(query.tokens), list(query.targets), {}
        assert backbone.causal or len(open_) == len(given) + 1
        for _ in range(len(given) + 1):
            best = logits_of(backbone, query._replace(tokens=tuple(tokens)), vectors)[open_].log_softmax(1).max(1)
            which = int(best.values.argmax())
            at, token = open_[which], int(best.indices[which])
            if backbone.causal:
                tokens.append(token)
                written[len(tokens) - 1] = token
                open_ = [len(tokens) - 1]
            else:
                tokens[at] = written[at] = token
                open_.remove(at)
        expected = [written[at] for at in sorted(written)]
        assert [token for token in found["written"][i].tolist() if token >= 0] == expected
        text = backbone.tokenization.tokenizer.decode(expected, skip_special_tokens=True)
        assert bool(found["said"][i]) == mean_the_same(text, instance.given)
        line = task.objective.describe(task.examples["test"][i], found, i)
        assert line["written"] == text.strip()
        assert line["answer"] in ("False", "True")


def test_every_round_shares_what_its_queries_begin_with(make_tasks, causal):
    task = make_tasks(causal)["WSC"]
    before = task.shown(task.showable[:1])
    questions = [Questions(task.instances("test", task.manual_template, before), task.objective)]
    plain, shared = (  # a round is one pass
        Workplace.shared(causal, PassSize(64, 1024, trunks=trunks), World(), task.objective) for trunks in (False, True)
    )
    [expected], [found] = answers(plain, questions, None), answers(shared, questions, None)
    assert found["written"].tolist() == expected["written"].tolist()
    assert shared.trunks.counts["trunk_tokens"] > 0, "in the first round"
    assert shared.trunks.counts["known_tokens"] > 0, "in a later one"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("the councilmen.", "The city councilmen", True),
        ("The city councilmen refused", "city councilmen", True),
        ("the demonstrators", "The city councilmen", False),
        (" ...", "The city", False),
        ("Bob's", "Bob", True),
    ],
)
def test_what_means_the_same(one, other, same):
    assert mean_the_same(one, other) == mean_the_same(other, one) == same


@pytest.mark.parametrize("name", list(KINDS))
def test_a_classifier_reads_the_whole(make_tasks, backbone, name):
    task = make_tasks(backbone)[name].way("alone")
    instances = task.instances("train", task.bare_template)
    head = task.objective.new_head(backbone.hidden_size).double()
    rows = []
    for instance in instances:
        of_queries = []
        for query in instance.queries:
            assert backbone.text_encoder().mask not in query.tokens
            [at] = query.targets
            assert at == (len(query.tokens) - 1 if backbone.causal else 0)
            states = backbone.model.base_model(torch.tensor([query.tokens]))[0][0]
            of_queries.append(head(states[at]))
        rows.append(torch.cat(of_queries))
    plain = torch.stack(rows)
    assert plain.shape[1] == len(KINDS[name].labels)
    found = asked(backbone, task, instances, None, head)
    torch.testing.assert_close(found["log_probability"], plain.log_softmax(1), rtol=1e-9, atol=1e-9)
    texts = [backbone.tokenization.tokenizer.decode(list(query.tokens)) for query in instances[0].queries]
    if name == "COPA":
        assert ["old" in texts[0], "came in" in texts[1]] == [True, True]


def test_words_of_several_tokens_are_named(tmp_path, causal):
    path = tmp_path / "mine.toml"
    path.write_text('[RTE]\nwords = { entailment = "certainly so", not_entailment = "No" }')
    data = read_superglue(write_superglue(tmp_path / "data"), "few-shot", ["RTE"])
    with pytest.raises(UsageError, match="RTE, pattern p-tuning: 'certainly so' is not one token of gpt2; give other"):
        superglue_tasks(data, read_patterns(path), causal)


def test_train_data_that_teach_nothing_are_named(make_tasks, causal):
    tasks = make_tasks(causal)
    rte = tasks["RTE"]
    rte.examples["train"][:] = [each for each in rte.examples["train"] if each.gold == 0]
    with pytest.raises(UsageError, match="fine-tuning: all training examples of RTE are entailment, from which no"):
        rte.must_be_learnable("fine-tuning")
    wsc = tasks["WSC"]
    wsc.examples["train"][:] = [each for each in wsc.examples["train"] if each.gold == 1]
    wsc.must_be_learnable("p-tuning")
    with pytest.raises(UsageError, match="all training examples of WSC are True"):
        wsc.way("alone").must_be_learnable("fine-tuning")
    wsc.examples["train"].clear()
    with pytest.raises(UsageError, match="no training example of WSC is True"):
        wsc.must_be_learnable("p-tuning")


def test_a_text_that_does_not_fit_is_named(tmp_path, causal):
    path = tmp_path / "mine.toml"
    path.write_text('[RTE]\nmax_tokens = 4\n[RTE.patterns]\npet-4 = "[premise...] [hypothesis] [Y]"')
    data = read_superglue(write_superglue(tmp_path / "data"), "few-shot", ["RTE"])
    task = superglue_tasks(data, read_patterns(path), causal)["RTE"]
    with pytest.raises(UsageError, match=r"^RTE, idx 0: template .* tokens are left where 4 fit"):
        task.instances("test", task.manual_template)


def test_long_texts_are_cut_and_questions_kept(tmp_path, causal):
    data = read_superglue(write_superglue(tmp_path / "data"), "few-shot", ["BoolQ"])
    example = data["BoolQ"].examples["test"][0]
    long = example._replace(fields={**example.fields, "passage": "The cat is old . " * 100})
    data["BoolQ"].examples["test"][0] = long
    task = superglue_tasks(data, read_patterns(None), causal)["BoolQ"]
    [query] = task.instances("test", task.manual_template)[0].queries
    assert 240 < len(query.tokens) <= 256
    assert causal.tokenization.tokenizer.decode(list(query.tokens)).endswith(f"{example.fields['question']} ? Answer:")


SHARED = Path(__file__).parents[4] / "shared" / "data" / "fewglue"


def test_submissions(make_tasks, causal):
    tasks = make_tasks(causal)
    said = {name: [i % 2 for i, _ in enumerate(task.examples["test"])] for name, task in tasks.items()}
    lines = {}
    for name, task in tasks.items():
        if name == "WSC":
            lines[name] = task.submission({"said": torch.tensor(said[name])})
        else:
            scores = torch.nn.functional.one_hot(torch.tensor(said[name]), len(KINDS[name].labels)).double()
            lines[name] = task.submission({"log_probability": scores})
    assert lines["BoolQ"][:2] == lines["WiC"][:2] == [{"idx": 0, "label": "false"}, {"idx": 1, "label": "true"}]
    assert lines["WSC"][:2] == [{"idx": 0, "label": "False"}, {"idx": 1, "label": "True"}]
    assert lines["COPA"][1] == {"idx": 1, "label": 1}
    assert lines["CB"][1] == {"idx": 1, "label": "contradiction"}
    assert lines["RTE"][1] == {"idx": 1, "label": "not_entailment"}
    assert len(lines["MultiRC"]) == 6
    assert lines["MultiRC"][1] == {
        "idx": 1,
        "passage": {
            "questions": [
                {"idx": 6, "answers": [{"idx": 12, "label": 0}, {"idx": 13, "label": 1}]},
                {"idx": 7, "answers": [{"idx": 14, "label": 0}, {"idx": 15, "label": 1}]},
            ]
        },
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="FewGLUE is not beside the repository")
def test_a_submission_of_right_answers_is_the_data(causal):
    """Field for field: what the file says, in the files' own numbering."""
    from megaprompt.tasks.superglue.submission import submission

    examples = read_superglue(SHARED, "few-shot", ["MultiRC"])["MultiRC"].examples["test"]
    lines = submission("MultiRC", examples, [example.gold for example in examples])
    rows = [json.loads(line) for line in (SHARED / "MultiRC" / "val.jsonl").read_text().split("\n") if line]
    kept = [
        {
            "idx": row["idx"],
            "passage": {
                "questions": [
                    {"idx": q["idx"], "answers": [{"idx": a["idx"], "label": a["label"]} for a in q["answers"]]}
                    for q in row["passage"]["questions"]
                ]
            },
        }
        for row in rows
    ]
    assert lines == kept
