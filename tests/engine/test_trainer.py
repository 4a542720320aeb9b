"""Joint training equals separate training, resuming equals not stopping, and the backbone is never touched."""

import copy
import dataclasses
import random

import pytest
import torch

from megaprompt.distributed.loss_scale import LossScale
from megaprompt.distributed.world import World
from megaprompt.engine import step as step_module
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.schedule import assign
from megaprompt.engine.trainer import Hooks, Interrupted, Trainer
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import RECIPES, Recipe
from megaprompt.prompting.template import Template
from tests.conftest import PAIRS, instances_of, objective_of, plain_logits

RECIPE = Recipe(0.01, 5e-4, 0.98, batch_size=4, max_epochs=3, patience=3)
TEMPLATE = Template.parse("<3>[X]<3>[Y]")


def training_set(backbone, relation: str, objective=None) -> TrainingSet:
    asked = instances_of(backbone, TEMPLATE, PAIRS[relation])
    return TrainingSet(relation, objective or objective_of(backbone), 6, asked, asked[3:])


def trainer_for(backbone, relations=("P36", "P30"), recipe=RECIPE, **options) -> Trainer:
    objective = objective_of(backbone)
    data = [training_set(backbone, relation, objective) for relation in relations]
    return Trainer(backbone, data, recipe, **{"size": PassSize(), "world": World(), **options})


def learn(backbone, *args, hooks=None, **options):
    return trainer_for(backbone, *args, **options).train(hooks or Hooks())


def test_joint_training_equals_separate_training(make_backbone):
    backbone = make_backbone("gpt2")
    together = learn(backbone)
    for relation, found in together.items():
        alone = learn(backbone, (relation,))[relation]
        torch.testing.assert_close(found.kept.vectors, alone.kept.vectors, rtol=1e-10, atol=1e-12)
        assert (found.epochs, found.best_epoch) == (alone.epochs, alone.best_epoch)


def test_gradient_of_a_step_equals_the_plain_loop(make_backbone):
    """The mean cross-entropy of each relation's batch, computed query by query."""
    backbone = make_backbone("llama")
    trainer = trainer_for(backbone)
    for learner in trainer.learners:
        learner.update = lambda: None  # keep the gradients
    reference = copy.deepcopy([learner.encoder for learner in trainer.learners])
    batches = [copy.copy(learner).next_batch() for learner in trainer.learners]
    trainer.train_step()
    for learner, encoder, batch in zip(trainer.learners, reference, batches, strict=True):
        asked = [learner.data.train[i] for i in batch]
        queries, gold = [one.queries[0] for one in asked], torch.tensor([one.gold for one in asked])
        torch.nn.functional.cross_entropy(plain_logits(backbone, queries, encoder()), gold).backward()
        for got, wanted in zip(learner.encoder.parameters(), encoder.parameters(), strict=True):
            assert (got.grad - wanted.grad).norm() < 1e-10 * wanted.grad.norm()


def test_pass_size_does_not_matter(make_backbone):
    backbone = make_backbone("gpt2")
    wide, narrow = learn(backbone), learn(backbone, size=PassSize(16, 16))
    for relation in wide:
        torch.testing.assert_close(wide[relation].kept.vectors, narrow[relation].kept.vectors, rtol=1e-10, atol=1e-12)


def test_backbone_is_frozen(make_backbone):
    backbone = make_backbone("gpt2")
    before = copy.deepcopy(backbone.model.state_dict())
    trainer = trainer_for(backbone)
    owned = {id(p) for learner in trainer.learners for group in learner.optimizer.param_groups for p in group["params"]}
    trainer.train(Hooks())
    assert len(trainer.learners[0].optimizer.state) > 0
    for name, parameter in backbone.model.named_parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert id(parameter) not in owned
        assert torch.equal(parameter, before[name]), name


def test_learning_finds_the_facts_and_picks_the_best_epoch(make_backbone):
    lines = []
    recipe = Recipe(0.03, 0.0, 1.0, batch_size=8, max_epochs=25, patience=25)
    found = learn(make_backbone("llama", torch.float32, seed=3), recipe=recipe, hooks=Hooks(log=lines.append))
    for relation, learned in found.items():
        own = [line for line in lines if line["relation"] == relation]
        assert [line["epoch"] for line in own] == list(range(1, learned.epochs + 1))
        best = max(own, key=lambda line: (line["dev_mrr"], line["dev_p_at_1"], -line["epoch"]))
        assert (best["epoch"], best["dev_p_at_1"]) == (learned.best_epoch, learned.dev["p_at_1"])
        assert own[-1]["train_loss"] < 0.8 * own[0]["train_loss"]
    assert found["P30"].dev["p_at_1"] >= 0.5


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_resumed_training_equals_uninterrupted(make_backbone, stop_after, tmp_path):
    backbone = make_backbone("gpt2", torch.float32)
    whole_log, log = [], []
    whole = learn(backbone, hooks=Hooks(log=whole_log.append))
    first = trainer_for(backbone)
    with pytest.raises(Interrupted):
        first.train(Hooks(log=log.append, should_stop=lambda: first.step == stop_after))
    torch.save(first.states(), tmp_path / "state.pt")
    second = trainer_for(backbone)
    second.restore(first.shared_state(), torch.load(tmp_path / "state.pt", weights_only=True).get)
    resumed = second.train(Hooks(log=log.append))
    for relation in whole:
        assert torch.equal(whole[relation].kept.vectors, resumed[relation].kept.vectors)
        assert whole[relation].dev == resumed[relation].dev

    def timeless(lines):
        return [{k: v for k, v in line.items() if k != "time"} for line in lines]

    assert timeless(log) == timeless(whole_log)


def test_early_stopping_counts_epochs_without_a_better_score(make_backbone):
    lines = []
    recipe = Recipe(1e-12, 0.0, 1.0, batch_size=4, max_epochs=50, patience=4)  # nothing changes
    found = learn(make_backbone("gpt2"), recipe=recipe, hooks=Hooks(log=lines.append))
    assert {learned.epochs for learned in found.values()} == {5}
    for relation, learned in found.items():  # the first of equals
        scores = [(line["dev_mrr"], line["dev_p_at_1"]) for line in lines if line["relation"] == relation]
        assert learned.best_epoch == 1 + scores.index(max(scores))


def test_max_steps_ends_with_an_evaluation(make_backbone):
    lines = []
    recipe = dataclasses.replace(RECIPE, max_epochs=100, max_steps=5)  # P36 has 4 steps an epoch, P30 has 3
    trainer = trainer_for(make_backbone("gpt2"), recipe=recipe)
    trainer.train(Hooks(log=lines.append))
    assert trainer.step == 5
    assert [(line["step"], line["relation"]) for line in lines] == [(3, "P30"), (4, "P36"), (5, "P36"), (5, "P30")]


def test_the_papers_recipe():
    recipe = RECIPES["paper"]
    assert (recipe.learning_rate, recipe.weight_decay, recipe.decay) == (1e-5, 5e-4, 0.98)
    assert (recipe.batch_size, recipe.max_epochs, recipe.patience) == (8, 99, 20)
    assert recipe.rate(facts=80, epoch=2, step=20) == pytest.approx(1e-5 * 0.98**2)
    assert recipe.steps(facts=81) == 990  # the last fact of an epoch fills no batch
    assert recipe.steps(facts=5) == 99  # where it would learn nothing at all


def what_the_papers_code_keeps(scores: list[float], patience: int, epochs: int) -> tuple[int, int]:
    """Its rules, written down from a description: dev is scored before every epoch; from the second time on a score
    that is at least the best (0 at first) is kept and resets the count; `patience` others in a row end the run. Returns
    the epoch that is kept, and how many were trained."""
    best, kept, stale = 0.0, 0, 0
    for trained, score in enumerate(scores[:epochs]):
        if trained > 0 and score >= best:
            best, kept, stale = score, trained, 0
        else:
            stale += 1
            if stale >= patience:
                return kept, trained
    return kept, epochs - 1  # what the last epoch has trained is never scored


@pytest.mark.parametrize("seed", range(20))
def test_early_stopping_is_that_of_the_papers_code(make_backbone, seed):
    chance = random.Random(seed)
    recipe = dataclasses.replace(RECIPES["paper"], max_epochs=29, patience=chance.choice((3, 5, 8)))
    scores = [chance.choice((0.0, 0.0, 0.1, 0.2, 0.3)) * (seed > 0) for _ in range(31)]  # seed 0: never any
    learner = trainer_for(make_backbone("gpt2"), ("P36",), recipe).learners[0]
    while learner.active:
        learner.next_batch()
        learner.cursor, learner.step, learner.seen = 8, learner.step + 1, 8
        epoch = learner.epoch + 1
        learner.take_dev({"p_at_1": scores[epoch], "mrr": chance.random()}, lambda epoch=epoch: epoch)
    assert (learner.best.kept, learner.result().epochs) == what_the_papers_code_keeps(scores, recipe.patience, 30)


def test_rate_rises_and_falls():
    recipe = Recipe(1.0, 0, 1.0, batch_size=1, max_epochs=10, patience=9, max_steps=20, warmup_steps=4)
    rates = [recipe.rate(100, 0, step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[-1] == pytest.approx(1 / 20)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("step", [1, 6])
def test_a_relation_that_diverges_is_retired_and_the_others_are_as_they_would_be_alone(make_backbone, step):
    """In the shared rows of a pass its prompts spoil the losses of all. Step 6 is after an epoch."""
    backbone, lines = make_backbone("gpt2"), []
    trainer = trainer_for(backbone)
    bad = trainer.learners[0]

    def break_down(*_):
        if trainer.step == step - 1:
            with torch.no_grad():
                bad.encoder.embedding.weight.fill_(float("inf"))
        return False

    break_down()
    found = trainer.train(Hooks(log=lines.append, should_stop=break_down))
    alone = learn(backbone, ("P30",))["P30"]
    torch.testing.assert_close(found["P30"].kept.vectors, alone.kept.vectors, rtol=1e-10, atol=1e-12)
    assert (found["P30"].dev, found["P30"].diverged) == (alone.dev, None)
    assert found["P36"].diverged["step"] == step
    assert found["P36"].diverged["reason"].startswith(f"the loss is nan in step {step}; lower the learning rate (it is")
    assert (found["P36"].kept is None) == (step == 1)  # what was best before is kept
    [line] = [line for line in lines if "diverged" in line]
    assert (line["relation"], line["step"], line["stopped"]) == ("P36", step, True)


def test_a_retired_relation_stays_retired_after_resuming(make_backbone):
    backbone = make_backbone("gpt2")
    first = trainer_for(backbone)
    with torch.no_grad():
        first.learners[0].encoder.embedding.weight.fill_(float("nan"))
    with pytest.raises(Interrupted):
        first.train(Hooks(should_stop=lambda: first.step == 2))
    second = trainer_for(backbone)
    second.restore(first.shared_state(), first.states().get)
    found = second.train(Hooks())
    assert found["P36"].diverged["step"] == 1
    assert found["P30"].epochs == 3


def test_relation_without_dev_facts(make_backbone):
    backbone = make_backbone("gpt2")
    asked = instances_of(backbone, TEMPLATE, PAIRS["P36"])
    with pytest.raises(MegapromptError, match="P36 needs facts in both train and dev"):
        TrainingSet("P36", objective_of(backbone), 6, asked, [])


def test_float16_skips_steps_that_overflow_and_lowers_the_scale(make_backbone):
    backbone = make_backbone("gpt2", torch.float32)
    plain = trainer_for(backbone)
    scaled = trainer_for(backbone, loss_scale=LossScale(scale=1024.0, hysteresis=1, window=2))
    plain.train_step()
    scaled.train_step()
    for one, other in zip(plain.learners, scaled.learners, strict=True):
        torch.testing.assert_close(one.encoder(), other.encoder(), rtol=1e-5, atol=1e-6)

    overflowing = trainer_for(backbone, loss_scale=LossScale(scale=1e38, hysteresis=2))
    before = [learner.encoder().detach().clone() for learner in overflowing.learners]
    overflowing.train_step()
    assert [learner.skipped for learner in overflowing.learners] == [1, 1]
    assert all(torch.equal(a, learner.encoder()) for a, learner in zip(before, overflowing.learners, strict=True))
    assert [learner.loss_scale.scale for learner in overflowing.learners] == [1e38, 1e38]  # tolerated once
    overflowing.train_step()
    assert [learner.loss_scale.scale for learner in overflowing.learners] == [5e37, 5e37]


def test_without_a_loss_scale_a_resumed_run_skips_no_step(make_backbone, monkeypatch):
    """As an uninterrupted one: gradients are looked at for overflows only where the loss is scaled."""
    first = trainer_for(make_backbone("gpt2"))
    second = trainer_for(make_backbone("gpt2"))
    second.restore(first.shared_state(), first.states().get)
    for trainer in (first, second):

        def overflowing(at, prompts, questions, *_):
            prompts.grad = torch.full_like(prompts, torch.inf)
            return torch.zeros(sum(len(each.instances) for each in questions), dtype=torch.float64)

        monkeypatch.setattr(step_module, "backward_passes", overflowing)
        trainer.train_step()
        assert [learner.skipped for learner in trainer.learners] == [0, 0]


def test_loss_scale_grows_after_good_steps_and_has_a_minimum():
    scale = LossScale(scale=4.0, window=2, hysteresis=1)
    assert scale.after_step(False).scale == 4.0
    assert scale.after_step(False).after_step(False).scale == 8.0
    assert scale.after_step(True).after_step(True).after_step(True).scale == 1.0
    assert LossScale(scale=4.0, dynamic=False).after_step(True).scale == 4.0


@pytest.mark.parametrize("weights", [[], [5], [1, 1, 1], [100, 1, 1, 1, 1, 1], [3, 9, 2, 7, 7, 1]])
def test_relations_are_divided_evenly(weights):
    groups = assign(weights, 2)
    loads = [sum(w for w, g in zip(weights, groups, strict=True) if g == group) for group in (0, 1)]
    assert abs(loads[0] - loads[1]) <= max(weights, default=0)
