"""Passes that go on from known keys and values give what the plain forward gives, losses and gradients alike."""

import dataclasses
import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, LlamaConfig

from megaprompt.backbone import Backbone
from megaprompt.backbone.megatron import FairseqMegatronConfig
from megaprompt.backbone.packed import language_model
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes, joint_answers
from megaprompt.engine.trainer import Hooks, Interrupted, Trainer
from megaprompt.engine.trunks import SHARE, may_be_cut
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.query import Query
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template
from megaprompt.prompting.trunks import SHORTEST, cut, trunks_of
from megaprompt.resources.plan import USABLE
from megaprompt.tasks.lama.one_token import rank_of_gold
from megaprompt.tasks.task import Instance
from tests.conftest import PAIRS, instances_of, objective_of, plain_logits

NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=256, initializer_range=0.2, **NO_SPECIAL),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.2, **NO_SPECIAL),
    "megatron": FairseqMegatronConfig(**SHAPE, max_position_embeddings=256, initializer_range=0.2, **NO_SPECIAL),
}
PSEUDO = 6
RECIPE = Recipe(0.01, 5e-4, 0.98, batch_size=4, max_epochs=3, patience=3)
TEMPLATE = Template.parse("<3>[X]<3>[Y]")


@pytest.fixture
def make(tokenizer):
    """A small backbone with room for long texts."""

    def make(kind: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Backbone:
        config = CONFIGS[kind]
        config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        model = language_model(config).from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
        return Backbone(model.to(dtype), tokenizer, kind)

    return make


def long_queries(seed: int) -> list[Query]:
    """Behind several texts of different length, one of which goes on from another, and behind none."""
    rng = random.Random(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(20, 200) for _ in range(length))

    first, second = text(SHORTEST + 1), text(2 * SHORTEST + 5)
    beginnings = [first, (*first, *text(SHORTEST)), second, text(3), ()]
    queries = []
    for _ in range(40):
        pseudo = [-1 - k for k in range(PSEUDO)]
        words = text(rng.choice((1, 1, 2, 3)))
        tail = (*pseudo[:3], *words, *pseudo[3:]) if rng.random() < 0.7 else (*words, *pseudo[: rng.choice((1, 3))])
        tokens = (*rng.choice(beginnings), *tail)
        target = len(tokens) - 1 if rng.random() < 0.8 else len(tokens) - 2
        queries.append(Query(tokens, (target,)))
    return queries


def asked(backbone: Backbone, queries) -> list[Instance]:
    gold = torch.randint(backbone.vocabulary_size, (len(queries),), generator=torch.Generator().manual_seed(0)).tolist()
    return [Instance((query,), token) for query, token in zip(queries, gold, strict=True)]


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa"), ("llama", "eager"), ("megatron", "sdpa")],
)
@pytest.mark.parametrize("size", [PassSize(24, 48), PassSize(256, 1024)], ids=["many passes", "one pass"])
def test_losses_and_gradients_equal_the_plain_forward(make, kind, attention, size):
    backbone = make(kind, attention)
    objective, queries = objective_of(backbone), long_queries(1)
    prompts = torch.randn(PSEUDO, backbone.hidden_size, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(queries), dtype=torch.float64)
    gold = torch.tensor([one.gold for one in asked(backbone, queries)])
    expected = cross_entropy(plain_logits(backbone, queries, prompts), gold, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), prompts)
    computed = {}
    tolerance = 1e-6 if (kind, attention) == ("llama", "eager") else 1e-10  # its softmax is in single precision
    for name, some in (("with", cut(queries)), ("without", queries)):
        at = Workplace.shared(backbone, size, World(), objective)
        prompts.grad = None
        questions = [Questions(asked(backbone, some), objective)]
        losses = backward_passes(at, prompts, questions, weights, lambda loss, last: loss.backward())
        torch.testing.assert_close(losses, expected.detach(), rtol=tolerance, atol=0)
        assert (prompts.grad - gradient).norm() < tolerance * gradient.norm()
        computed[name] = at.trunks.counts
    assert computed["with"]["tokens"] < computed["without"]["tokens"]
    assert computed["with"]["trunk_tokens"] >= 4 * SHORTEST + 6
    assert not computed["without"]["trunk_tokens"]


def behind(backbone: Backbone, template: str, pairs, facts: str) -> list[Instance]:
    template = Template.parse(template)
    queries = [template.render({"X": subject}, backbone.text_encoder(), before=facts) for subject, _ in pairs]
    gold = backbone.tokenization.single_tokens([answer for _, answer in pairs])
    return [Instance((query,), token) for query, token in zip(queries, gold, strict=True)]


def demonstrations(relation: str, count: int) -> str:
    return "".join(f"{subject} is in {answer} .\n" for subject, answer in PAIRS[relation][:count])


def test_answers_behind_demonstrations_equal_the_plain_forward(make):
    """Of two tasks, each behind facts of its own; nobody has marked anything."""
    backbone = make("gpt2")
    objective = objective_of(backbone)
    parts = [
        behind(backbone, "The capital of [X] is [Y]", PAIRS[relation], demonstrations(relation, count))
        for relation, count in (("P36", 5), ("P30", 3))
    ]
    size = PassSize(48, 96)
    at = Workplace.shared(backbone, size, World(), objective)
    found = answers(at, [Questions(part, objective) for part in parts], None)
    for part, one in zip(parts, found, strict=True):
        with torch.no_grad():
            logits = plain_logits(backbone, [each.queries[0] for each in part], torch.zeros(1, 32).double())
        gold = torch.tensor([each.gold for each in part])
        assert torch.equal(one["rank"], rank_of_gold(logits, gold))
        expected = logits.log_softmax(1).gather(1, gold[:, None])[:, 0]
        torch.testing.assert_close(one["log_probability"], expected, rtol=1e-10, atol=1e-12)
    whole = Workplace.shared(backbone, dataclasses.replace(size, trunks=False), World(), objective)
    answers(whole, [Questions(part, objective) for part in parts], None)
    counts = at.trunks.counts
    assert counts["tokens"] + counts["trunk_tokens"] < whole.trunks.counts["tokens"]
    assert counts["trunk_tokens"] < 150  # each text once


def test_an_ensemble_behind_demonstrations(make):
    backbone = make("llama")
    objective, facts = objective_of(backbone), demonstrations("P36", 6)
    wordings = [behind(backbone, text, PAIRS["P36"], facts) for text in ("[X] is [Y]", "in [X] is [Y]")]
    found = []
    for size in (PassSize(48, 96), PassSize(48, 96, trunks=False)):
        at = Workplace.shared(backbone, size, World(), objective)
        found.append(joint_answers(at, wordings, [0.3, 0.7], objective))
        assert bool(at.trunks.counts["trunk_tokens"]) == size.trunks
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ training


def trainer_for(backbone: Backbone, size: PassSize = PassSize(), **options) -> Trainer:  # noqa: B008
    """Two relations, behind demonstrations of different length."""
    objective = objective_of(backbone)
    data = []
    for relation, count in (("P36", 6), ("P30", 4)):
        facts = demonstrations(relation, count)
        train = behind(backbone, TEMPLATE.text, PAIRS[relation], facts)
        data.append(TrainingSet(relation, objective, PSEUDO, train, train[3:]))
    return Trainer(backbone, data, RECIPE, size=size, **{"world": World(), **options})


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_with_and_without(make, kind):
    backbone = make(kind)
    with_trunks, without = trainer_for(backbone), trainer_for(backbone, PassSize(trunks=False))
    assert [len(trunks_of(one.data.train[0].queries[0])) for one in with_trunks.learners] == [1, 1]
    found, expected = with_trunks.train(Hooks()), without.train(Hooks())
    for relation, one in found.items():
        torch.testing.assert_close(one.kept.vectors, expected[relation].kept.vectors, rtol=1e-8, atol=1e-10)
        assert one.dev == pytest.approx(expected[relation].dev)
    counts = with_trunks.at.trunks.counts
    assert counts["tokens"] < without.at.trunks.counts["tokens"] / 2
    lengths = [len(demonstrations(relation, count)) for relation, count in (("P36", 6), ("P30", 4))]
    assert counts["trunk_tokens"] <= sum(lengths)  # once
    assert counts["known_tokens"] > 5 * counts["trunk_tokens"]
    assert not with_trunks.at.trunks.known  # let go of at the end


def test_a_budget_that_is_too_small_for_all(make):
    backbone = make()
    ends = {one.data.task: one.data.train[0].queries[0].cuts[-1] for one in trainer_for(backbone).learners}
    enough = trainer_for(backbone, trunk_bytes=sum(ends.values()) * backbone.known_bytes)
    assert all(one.data.train[0].queries[0].cuts for one in enough.learners)
    little = trainer_for(backbone, trunk_bytes=ends["P36"] * backbone.known_bytes)
    assert [bool(one.data.train[0].queries[0].cuts) for one in little.learners] == [True, False]
    none = trainer_for(backbone, trunk_bytes=0)
    whole = trainer_for(backbone, PassSize(trunks=False))
    found = [one.train(Hooks()) for one in (enough, little, none, whole)]
    for relation, one in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(one.kept.vectors, other[relation].kept.vectors, rtol=1e-8, atol=1e-10)
        assert torch.equal(found[2][relation].kept.vectors, found[3][relation].kept.vectors)


def test_what_the_memory_takes_is_what_the_budget_counts(make):
    assert 1 / SHARE < 1 - USABLE  # of a memory
    for kind in CONFIGS:
        backbone = make(kind, dtype=torch.float32)
        trainer = trainer_for(backbone)
        trainer.train_step()
        sizes = [
            (trunk.length, sum(t.untyped_storage().nbytes() for layer in found for t in layer))
            for trunk, found in trainer.at.trunks.known.items()
        ]
        assert len(sizes) == 2
        assert all(size == length * backbone.known_bytes for length, size in sizes)


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_resumed_training_is_the_same_to_the_last_bit(make, stop_after):
    backbone = make("llama", dtype=torch.float32)
    whole = trainer_for(backbone).train(Hooks())
    first = trainer_for(backbone)
    with pytest.raises(Interrupted):
        first.train(Hooks(should_stop=lambda: first.step == stop_after))
    second = trainer_for(backbone)
    second.restore(first.shared_state(), first.states().get)
    resumed = second.train(Hooks())
    for relation, one in whole.items():
        assert torch.equal(one.kept.vectors, resumed[relation].kept.vectors)
        assert one.dev == resumed[relation].dev


def test_a_trunk_is_the_same_to_the_last_bit_whatever_is_computed_beside_it(make):
    backbone = make("gpt2", dtype=torch.float32)
    one, other = trainer_for(backbone), trainer_for(backbone, PassSize(48, 48))
    for _ in range(5):
        other.train_step()
    one.train_step()
    for trunk, layers in one.at.trunks.known.items():
        for pair, same in zip(layers, other.at.trunks.known[trunk], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, same, strict=True))


def test_questions_without_constant_text_are_computed_as_before(make_backbone):
    """To the last bit, whether or not trunks are allowed: those that begin with a pseudo token, and short ones."""
    backbone = make_backbone("gpt2", torch.float32)
    objective = objective_of(backbone)
    for template in ("<3>[X]<3>[Y]", "The capital of [X] <3>[Y]"):
        asked = instances_of(backbone, Template.parse(template), PAIRS["P36"])
        pseudo = Template.parse(template).num_pseudo_tokens
        found = []
        for size in (PassSize(), PassSize(trunks=False)):
            data = [TrainingSet("P36", objective, pseudo, asked, asked)]
            trainer = Trainer(backbone, data, RECIPE, size=size, world=World())
            found.append(trainer.train(Hooks())["P36"].kept.vectors)
            assert not trainer.at.trunks.counts["trunk_tokens"]
        assert torch.equal(*found)


def test_where_nothing_is_kept(make):
    backbone = make()
    assert may_be_cut(backbone, PassSize())
    assert not may_be_cut(backbone, PassSize(row_tokens=None))
    assert not may_be_cut(backbone, PassSize(trunks=False))
    backbone.requires_grad_(True)  # its weights are trained
    assert not may_be_cut(backbone, PassSize())
    backbone.requires_grad_(False).causal = False
    assert not may_be_cut(backbone, PassSize())
