"""Asking about one subject with a saved prompt: tokens, candidates of any length, or what the model writes."""

import itertools
import random

import pytest
import torch

from megaprompt.config import AskConfig, ProbeConfig
from megaprompt.errors import UsageError
from megaprompt.prompting.query import Query
from megaprompt.run.ask import ask
from megaprompt.run.job import probe
from megaprompt.tasks.lama.continuations import _is_end, continuations, ends
from tests.tasks.bear_data import CAPITALS, write_bear
from tests.tasks.test_whole_answers import masked_backbone


@pytest.fixture
def run(backbone_directory, tmp_path):
    """Prompts that were learned on BEAR's kind of data."""
    data, out = write_bear(tmp_path / "bear"), tmp_path / "run"
    options = {"methods": ("p-tuning",), "relations": ("P36",), "max_epochs": 1, "scores": "all"}
    probe(ProbeConfig(backbone=str(backbone_directory), data=str(data), out=out, **options))
    return out


def test_candidates_are_whole_strings_with_probabilities(run):
    found = ask(AskConfig(subject="France", prompts=run, top=20))
    assert {text for text, _ in found} == set(CAPITALS.values())
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert sum(p for _, p in found) == pytest.approx(1)
    [line] = [line for line in (run / "predictions" / "P36.jsonl").read_text().splitlines() if '"France"' in line]
    assert f'[["{found[0][0]}", {round(found[0][1], 6)}]' in line, "as in the run"


def test_each_kind_of_answer_on_request(run):
    tokens = ask(AskConfig(subject="France", prompts=run, answers="token", top=3))
    assert len(tokens) == 3
    written = ask(AskConfig(subject="France", prompts=run, answers="text", top=3))
    assert len(written) == 3
    assert 0 < sum(p for _, p in written) <= 1
    assert written != tokens


def test_a_masked_model_chooses_but_does_not_write(tmp_path):
    backbone, out = masked_backbone("bert"), tmp_path / "run"
    backbone.model.float().save_pretrained(tmp_path / "bert")
    backbone.tokenization.tokenizer.save_pretrained(tmp_path / "bert")
    options = {"data": str(write_bear(tmp_path / "bear")), "relations": ("P30",), "methods": ("manual",)}
    probe(ProbeConfig(backbone=str(tmp_path / "bert"), out=out, **options))
    found = ask(AskConfig(subject="France", prompts=out, top=20))
    assert {text for text, _ in found} == {"Europe", "Asia", "Africa", "South America"}
    assert sum(p for _, p in found) == pytest.approx(1)
    with pytest.raises(UsageError, match="a masked model does not write"):
        ask(AskConfig(subject="France", prompts=out, answers="text"))


# ------------------------------------------------------------------------------------------------------- continuations

END = torch.tensor([False, False, False, True])


def _next(tokens: tuple[int, ...]) -> torch.Tensor:
    chance = random.Random(str(tokens))
    weights = torch.tensor([chance.random() ** 2 for _ in END], dtype=torch.float64)
    return (weights / weights.sum()).log()


def _log_probabilities(queries):
    return torch.stack([_next(query.tokens[: query.targets[0] + 1]) for query in queries])


@pytest.mark.parametrize(
    "decode", ["".join, lambda texts: "".join(texts).replace("c", "ab")], ids=["plain", "same text"]
)
def test_continuations_are_the_best_of_all(decode):
    """A beam that is wide enough finds what an enumeration finds, however many tokens it takes."""
    every: dict[str, float] = {}
    for length in range(1, 8):
        for tokens in itertools.product(range(3), repeat=length):
            path = (7, *tokens)
            log = sum(_next(path[: i + 1])[token] for i, token in enumerate(tokens)) + _next(path)[3]
            text = decode(["abc"[token] for token in tokens])
            every[text] = every.get(text, 0.0) + log.exp().item()
    expected = sorted(every.items(), key=lambda one: -one[1])[:50]
    found = continuations(Query((7,), (0,)), _log_probabilities, END, lambda ids: decode(["abc"[i] for i in ids]), 50)
    assert [text for text, _ in found[:5]] == [text for text, _ in expected[:5]]
    assert [p for _, p in found[:5]] == pytest.approx([p for _, p in expected[:5]], rel=0.02)


def test_where_continuations_end(make_backbone):
    tokenization = make_backbone().tokenization
    found = ends(tokenization)
    names = tokenization.tokenizer.convert_ids_to_tokens(range(len(found)))
    assert all(found[names.index(each)] for each in (".", ",", "Ċ", "<eos>"))
    assert not any(found[names.index(each)] for each in ("P", "'", "-", "ĠParis", "Ġ"))
    assert not _is_end("", "\u2581"), "before the digits of a number, in Gemma's tokenizer"
    assert _is_end("", "")


def test_a_subject_that_leaves_no_room_for_an_answer(run):
    with pytest.raises(UsageError, match=r"'Peru Peru Peru Peru ' \.\.\.: the question has .* something shorter"):
        ask(AskConfig("Peru " * 50, prompts=run, relation="P36", answers="text"))
