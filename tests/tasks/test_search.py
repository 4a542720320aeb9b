"""The exact search finds what a ranking of all candidates finds, and reads less."""

import math
import random
from dataclasses import replace

import pytest
import torch

from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.query import Query
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks
from megaprompt.tasks.lama.whole_answers import BestAnswer, WholeAnswers
from megaprompt.tasks.search import Search
from megaprompt.tasks.task import Instance
from tests.tasks.bear_data import write_bear


def instance_of(texts, gold=0, before=(1, 2)) -> Instance:
    """Candidates, given by their tokens behind some that they share."""
    queries = [
        Query((*before, *text)[:-1], tuple(range(len(before) - 1, len(before) + len(text) - 1)), tuple(text))
        for text in texts
    ]
    return Instance(tuple(queries), gold)


def searched(instance, needs, value):
    """The search when it has ended, and how many nodes each round read."""
    search, nodes = Search(instance, needs), []
    while asked := search.ask():
        nodes.append(len({query.tokens[: target + 1] for query in asked for target in query.targets}))
        search.tell([value(query) for query in asked])
    return search, nodes


def model(seed: int, coarse: bool):
    """A language model of four tokens: log-probabilities by the tokens before; coarse ones are often equal."""

    def of(before: tuple[int, ...]) -> list[float]:
        chance = random.Random(str((seed, before)))
        weights = [chance.choice([1, 2]) if coarse else chance.random() ** 3 for _ in range(4)]
        return [math.log(weight / (8 if coarse else sum(weights))) for weight in weights]

    def value(query: Query) -> float:
        return math.fsum(of(query.tokens[: t + 1])[label] for t, label in zip(query.targets, query.labels, strict=True))

    return value


@pytest.mark.parametrize("coarse", [False, True])
def test_any_tree_is_searched_exactly(coarse):
    """Texts may be the beginnings of others, and scores may be equal."""
    fewer = 0
    for seed in range(200):
        chance = random.Random(seed)
        texts = {tuple(chance.randrange(4) for _ in range(chance.randint(1, 4))) for _ in range(chance.randint(1, 25))}
        instance = instance_of(sorted(texts), chance.randrange(len(texts)))
        value = model(seed, coarse)
        scores = [value(query) for query in instance.queries]
        gold = scores[instance.gold]
        complete, [all_nodes] = searched(instance, "all", value)
        assert complete.scores == scores
        assert complete.complete
        by_rank, nodes = searched(instance, "rank", value)
        known = [i for i, one in enumerate(by_rank.known) if one]
        assert {i for i, score in enumerate(scores) if score >= gold - 1e-9} <= set(known)
        assert all(by_rank.scores[i] == pytest.approx(scores[i]) for i in known)
        best, fewest = searched(instance, "best", value)
        assert {i for i, score in enumerate(scores) if score >= max(scores) - 1e-9} <= {
            i for i, one in enumerate(best.known) if one
        }
        assert all(scores[i] < max(scores) or best.known[i] for i in range(len(scores)))
        fewer += sum(nodes) < all_nodes
        assert len(fewest) <= 8
    assert coarse or fewer > 40


def test_what_cannot_win_is_not_read():
    """The second token of the third text is never read: it is lost with the first."""
    instance = instance_of([(3, 4), (5, 6, 7), (8, 9, 10, 11)], gold=0)
    likely = {3: -1.0, 4: -0.5, 5: -1.2, 6: -0.1, 7: -0.3, 8: -1.6, 9: -0.1, 10: -0.1, 11: -0.1}
    read: set[int] = set()

    def value(query):
        read.update(query.labels)
        return sum(likely[label] for label in query.labels)

    search, nodes = searched(instance, "rank", value)
    assert read == {3, 4, 5, 6, 7, 8}
    assert search.known == [True, False, False], "the second text was read to its end, but the third one may be better"
    assert not search.complete
    assert nodes == [2, 2]


def test_scores_that_are_no_numbers_win_nothing():
    instance = instance_of([(3, 4), (5, 6), (7, 8)], gold=1)
    for objective in (WholeAnswers(needs="all"), WholeAnswers(needs="rank"), BestAnswer(needs="best")):
        rounds = objective.rounds([instance])
        asked = next(rounds)
        with pytest.raises(StopIteration) as end:
            rounds.send({"log_probability": torch.full((len(asked),), torch.nan)})
        assert objective.measure(end.value.value, [instance])["p_at_1"] == 0
        assert math.isfinite(objective.measure(end.value.value, [instance]).get("mrr", 0.0))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("text", [None, "<2>[X]<1>[Y]<1>.", "<1>[Y] [X]", "[X]<2>[Y]"])
def test_the_search_finds_what_all_scores_say(make_backbone, tmp_path, kind, text):
    backbone, size = make_backbone(kind), PassSize(64, 256)
    torch.manual_seed(0)
    prompts = torch.randn(4, backbone.hidden_size, dtype=torch.float64)
    for name in ("P36", "P30"):
        found = {}
        for needs in ("all", "rank", "best"):
            [task] = lama_tasks(
                load_data(str(write_bear(tmp_path / f"{name}-{needs}"))), backbone, AskFor(needs=needs),
                names=(name,), splits=("test",), limit=None, seed=0,
            ).values()  # fmt: skip
            at = Workplace.shared(backbone, size, World(), task.objective)
            templates = [task.template(each) for each in ((text,) if text else task.wordings)]
            asked = [Questions(task.instances("test", each), task.objective) for each in templates]
            found[needs] = answers(at, asked, prompts)
        for every, ranked, best in zip(*found.values(), strict=True):
            assert torch.equal(every["rank"], ranked["rank"])
            assert torch.equal(every["rank"] == 1, best["rank"] == 1)
            assert torch.equal(every["top"][:, 0], best["top"][:, 0])
            known = ranked["top"] >= 0
            assert torch.equal(every["top"][known], ranked["top"][known])
            assert bool((known.sum(1) >= ranked["rank"]).all()), "the object and all that is better"
            whole = ~ranked["log_probability"].isnan()
            torch.testing.assert_close(every["log_probability"][whole], ranked["log_probability"][whole])


def test_equal_candidates_count_against(make_backbone, tmp_path):
    """Two answers that differ in their first letter only are the same sentence where it stands first."""
    backbone = make_backbone()
    [task] = lama_tasks(
        load_data(str(write_bear(tmp_path))), backbone, AskFor(), names=("P36",), splits=("test",), limit=1, seed=0
    ).values()
    [example] = task.examples["test"]
    twice = example._replace(candidates=(example.answer, example.answer[0].lower() + example.answer[1:]), gold=0)
    for objective in (WholeAnswers(needs="all"), WholeAnswers(needs="rank"), BestAnswer(needs="best")):
        asked = replace(task, objective=objective)
        at = Workplace.shared(backbone, PassSize(64, 256), World(), objective)
        [found] = answers(at, [Questions([asked.instance(twice, asked.template("[Y] in [X]"))], objective)], None)
        assert objective.measure(found, [twice])["p_at_1"] == 0
