"""The metrics against scikit-learn, which is installed with the oracle of `make fairseq`; and by hand."""

import sys
from pathlib import Path

import pytest
import torch

from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.metrics import ACCURACY, ACCURACY_AND_F1, EM_AND_F1A, exact_match, f1, macro_f1
from megaprompt.tasks.superglue.objectives import Verbalizer
from megaprompt.tasks.task import Example

ORACLE = Path(__file__).parents[3] / ".fairseq" / "lib"


@pytest.fixture(scope="module")
def sklearn_metrics():
    sys.path.append(str(ORACLE))
    yield pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (make fairseq does it)")
    sys.path.remove(str(ORACLE))


def drawn(classes: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    said, gold = torch.randint(classes, (2, count), generator=generator)
    return said, gold


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("classes", "count"), [(2, 3), (2, 40), (3, 4), (3, 60)])
def test_as_scikit_learn(sklearn_metrics, classes, count, seed):
    said, gold = drawn(classes, count, seed)
    measured = ACCURACY_AND_F1(said, gold, [None] * count)
    assert measured["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(gold, said))
    expected = sklearn_metrics.f1_score(gold, said, average="macro", zero_division=0)
    assert measured["macro_f1"] == pytest.approx(expected)
    assert measured["score"] == pytest.approx((measured["accuracy"] + measured["macro_f1"]) / 2)
    for one in range(classes):
        expected = sklearn_metrics.f1_score(gold, said, labels=[one], average=None, zero_division=0)[0]
        assert f1(said, gold, one) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_multirc_as_scikit_learn(sklearn_metrics, seed):
    said, gold = drawn(2, 50, seed)
    groups = [str(int(group)) for group in torch.randint(15, (50,), generator=torch.Generator().manual_seed(seed))]
    measured = EM_AND_F1A(said, gold, groups)
    assert measured["f1a"] == pytest.approx(sklearn_metrics.f1_score(gold, said, zero_division=0))
    exact = []
    for group in set(groups):
        of_group = [i for i, each in enumerate(groups) if each == group]
        exact.append(sklearn_metrics.accuracy_score(gold[of_group], said[of_group]) == 1)
    assert measured["em"] == pytest.approx(sum(exact) / len(exact))


def test_by_hand():
    gold = torch.tensor([0, 0, 1, 2])
    assert macro_f1(torch.tensor([0, 1, 1, 1]), gold) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1(torch.tensor([1, 1]), torch.tensor([1, 1])) == 1, "classes that do not occur do not count"
    assert exact_match(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 1, 0]), ["a", "a", "b", "b"]) == 0.5
    assert ACCURACY(torch.tensor([1, 0]), torch.tensor([1, 1]), [None, None]) == {"score": 0.5, "accuracy": 0.5}
    assert all(value != value for value in EM_AND_F1A(torch.tensor([]), torch.tensor([]), []).values())


def test_every_task_has_a_score_first():
    assert {name: list(kind.metrics.names) for name, kind in KINDS.items()} == {
        **{name: ["score", "accuracy"] for name in ("BoolQ", "COPA", "RTE", "WiC", "WSC")},
        "CB": ["score", "accuracy", "macro_f1"],
        "MultiRC": ["score", "em", "f1a"],
    }


def test_always_the_same_answer_by_hand():
    """Of MultiRC's answers a third is right: always 0 and always 1 are each the best by one metric."""
    gold = [1, 0, 0, 0, 1, 0]
    examples = [Example({}, "", label, group=f"{i // 2}") for i, label in enumerate(gold)]
    found = Verbalizer(KINDS["MultiRC"], ["no", "yes"], [0, 1]).constant(examples)
    assert found == {"score": 1 / 4, "em": 1 / 3, "f1a": 1 / 2}


def test_always_the_majority_on_the_validation_sets():
    """What the published figures stand beside, from the counts of labels."""
    cb = torch.tensor([1] * 28 + [0] * 23 + [2] * 5)
    measured = ACCURACY_AND_F1(torch.ones_like(cb), cb, [None] * 56)
    assert (measured["accuracy"], measured["macro_f1"]) == pytest.approx((0.5, 0.222), abs=5e-4)
    multirc = torch.tensor([1] * 2075 + [0] * 2773)
    assert f1(torch.ones_like(multirc), multirc, 1) == pytest.approx(0.599, abs=5e-4)
