"""The model tuned with its prompts: gradients and steps against plain PyTorch, dropout, and who is best on dev."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.engine.best import Best
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.trainer import Hooks, Trainer
from megaprompt.engine.weights import Weights
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import Tuning
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.patterns import read_patterns
from megaprompt.tasks.superglue.recipes import paper_tuning
from tests.tasks.superglue.made_up import make_tokenizer


def make_llama() -> Backbone:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=len(tokenizer), max_position_embeddings=96, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return Backbone(LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double(), tokenizer, "llama")


@pytest.fixture(params=["gpt2", "llama", "bert"])
def tuned(request) -> Backbone:
    """A backbone that a test may change, without dropout."""
    fixture = {"gpt2": "causal", "bert": "masked"}.get(request.param)
    backbone = copy.deepcopy(request.getfixturevalue(fixture)) if fixture else make_llama()
    return backbone.requires_grad_(True)


def changed(tuning: Tuning, **options) -> Tuning:
    return Tuning(*(dataclasses.replace(recipe, **options) for recipe in (tuning.weights, tuning.prompts)))


def trainer_for(backbone, task, tuning, size=PassSize(64, 128), **options):  # noqa: B008
    task = task.way("learned")
    template = task.template(task.learned)
    train, dev = task.training_instances(template), task.instances("dev", template)
    data = TrainingSet(task.name, task.objective, template.num_pseudo_tokens, train, dev)
    weights = Weights(backbone, tuning.weights, World(), None)
    return Trainer(backbone, [data], tuning.prompts, size=size, world=World(), weights=weights, **options)


def padded_logits(backbone, query, prompts, width):
    """Of one query alone, in a row that is padded to some width: [width, vocabulary]."""
    ids = torch.tensor([*query.tokens, *[0] * (width - len(query.tokens))])
    vectors = backbone.model.get_input_embeddings()(ids.clamp(min=0))
    vectors = torch.where((ids < 0)[:, None], prompts[(-1 - ids).clamp(min=0)], vectors)
    mask = (torch.arange(width) < len(query.tokens)).long()
    return backbone.model(inputs_embeds=vectors[None], attention_mask=mask[None]).logits[0]


def plain_loss(backbone, name, instance, prompts, width=96):
    """As the original code has it, query by query; COPA's hinge for each example."""
    rows = [padded_logits(backbone, query, prompts, width)[list(query.targets)] for query in instance.queries]
    if name == "COPA":
        right, wrong = (
            rows[i].log_softmax(1).gather(1, torch.tensor(instance.queries[i].labels)[:, None]).sum()
            for i in (instance.gold, 1 - instance.gold)
        )
        return (1 - right + wrong).clamp(min=0)
    if name == "WSC":
        return cross_entropy(rows[0], torch.tensor(instance.queries[0].labels))
    words = [read_patterns(None)[name].learned.words[answer] for answer in KINDS[name].answers]
    columns = backbone.tokenization.single_tokens(words)
    return cross_entropy(rows[0][:, columns], torch.tensor([instance.gold]))


@pytest.mark.parametrize("name", ["RTE", "MultiRC", "COPA", "WSC"])
def test_a_step_equals_plain_pytorch_on_padded_queries(make_tasks, tuned, name):
    """Gradients of the encoder and of all weights, clipped together; two AdamW, each with its rate and decay."""
    tuning = changed(paper_tuning(name, "few-shot"), dropout=False, clip=0.1)
    plain = copy.deepcopy(tuned)
    trainer = trainer_for(tuned, make_tasks(tuned)[name], tuning)
    [learner] = trainer.learners
    encoder, found = copy.deepcopy(learner.encoder), {}
    for optimizer in (trainer.weights.optimizer, learner.optimizer):
        optimizer.register_step_pre_hook(
            lambda each, *_: found.update(
                (id(p), p.grad.clone()) for group in each.param_groups for p in group["params"] if p.grad is not None
            )
        )
    batch = copy.copy(learner).next_batch()
    trainer.train_step()

    losses = [plain_loss(plain, name, learner.data.train[i], encoder()) for i in batch]
    torch.stack(losses).mean().backward()
    named = [(f"encoder {n}", p) for n, p in encoder.named_parameters()] + list(plain.named_parameters())
    mine = [*learner.encoder.parameters(), *tuned.parameters()]
    norm = torch.cat([p.grad.flatten() for _, p in named if p.grad is not None]).norm()
    assert norm > 0.1, "it is clipped"
    for (what, parameter), own in zip(named, mine, strict=True):
        if parameter.grad is None:  # BERT's pooler and the like
            assert id(own) not in found, what
            continue
        parameter.grad *= 0.1 / (norm + 1e-6)
        torch.testing.assert_close(found[id(own)], parameter.grad, rtol=1e-8, atol=1e-12, msg=what)
    no_decay = ("bias", "ln_", "norm", "LayerNorm")  # as the original names them
    groups = [[p for n, p in plain.named_parameters() if any(k in n for k in no_decay) == none] for none in (0, 1)]
    decayed = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    torch.optim.AdamW(decayed, 1e-5 / 151 if name == "RTE" else 1e-5).step()  # RTE warms up
    prompts = {"RTE": 1e-4 / 151, "COPA": 1e-5}.get(name, 1e-4)
    torch.optim.AdamW(encoder.parameters(), prompts, weight_decay=0.0).step()
    for (what, parameter), own in zip(named, mine, strict=True):
        if parameter.grad is not None:  # Adam's first step is as large for a gradient of 1e-17 as for any other
            moved = parameter.grad.abs() > 1e-8
            torch.testing.assert_close(own[moved], parameter[moved], rtol=1e-10, atol=1e-13, msg=what)


def test_dropout_is_on_while_weights_are_trained_and_repeats(make_tasks, causal):
    """On dev it is off; the same seed drops the same."""
    assert causal.model.config.attn_pdrop == 0.1

    def lines(tuning, seed=0):
        backbone = copy.deepcopy(causal).requires_grad_(True)
        trainer = trainer_for(backbone, make_tasks(causal)["RTE"], tuning, seed=seed)
        found = []
        trainer.train(Hooks(log=lambda line: found.append({**line, "time": None})))
        assert not backbone.model.training
        return found

    tuning = changed(paper_tuning("RTE", "few-shot"), max_steps=4, dev_every=2)
    dropped = lines(tuning)
    assert len(dropped) == 2
    assert dropped == lines(tuning)
    whole = lines(changed(tuning, dropout=False))
    assert [line["train_loss"] for line in dropped] != [line["train_loss"] for line in whole]


def test_answers_to_a_question_follow_each_other(make_tasks, causal):
    """In every epoch all of them, groups in the order of the shuffled one."""

    def epoch(grouped):
        tuning = changed(paper_tuning("MultiRC", "few-shot"), grouped=grouped, batch_size=5)
        backbone = copy.deepcopy(causal).requires_grad_(True)
        [learner] = trainer_for(backbone, make_tasks(causal)["MultiRC"], tuning).learners
        order = [i for _ in range(5) for i in learner.next_batch()]
        assert sorted(order) == list(range(24))
        return [learner.data.train[i].group for i in order]

    shuffled, grouped = epoch(False), epoch(True)
    assert grouped == [group for group in dict.fromkeys(shuffled) for _ in range(2)]
    assert shuffled != grouped


def best_of(scores, patience=3):
    """At which of several scores on dev the best is, and after how many it stops."""
    best = Best(("score",), "score", ("accuracy", "f1"))
    for number, (accuracy, f1) in enumerate(scores, 1):
        each = {"score": (accuracy + f1) / 2, "accuracy": accuracy, "f1": f1}
        best.take(each, number, lambda number=number: number, "kept")
        if best.stale == patience:
            break
    return best.kept, number


@pytest.mark.parametrize(
    ("scores", "best", "stopped"),
    [
        ([(0.5, 0.5), (0.6, 0.6), (0.6, 0.6), (0.6, 0.6), (0.6, 0.6), (0.9, 0.9)], 5, 5),  # ties: kept, but no gain
        ([(0.5, 0.5), (0.4, 0.4), (0.3, 0.3), (0.6, 0.6), (0.5, 0.5), (0.5, 0.5), (0.5, 0.5)], 4, 7),
        ([(0.5, 0.5), (0.9, 0.4), (0.6, 0.5), (0.4, 0.9)], 3, 4),  # both must not fall; both must rise for a gain
        ([(0.5, 0.5), (0.9, 0.4), (0.6, 0.5), (0.6, 0.5), (0.7, 0.7)], 4, 4),
    ],
)
def test_ties_are_kept_but_are_no_gain(scores, best, stopped):
    assert best_of(scores) == (best, stopped)


def test_recipes_are_those_of_the_scripts_and_the_paper():
    few, full = paper_tuning("RTE", "few-shot"), paper_tuning("WiC", "full")
    assert (few.prompts.learning_rate, few.weights.learning_rate) == (1e-4, 1e-5)
    weights = few.weights
    assert (weights.steps(32), weights.warmup_steps, weights.dev_every, weights.patience) == (3500, 150, 20, 10)
    assert paper_tuning("CB", "few-shot").weights.steps(32) == 250
    assert full.weights.steps(160) == 100
    assert [full.weights.rate(160, 0, step) for step in (0, 50, 100)] == pytest.approx([1e-5, 5e-6, 0])
    assert full.weights.dev_every is None
