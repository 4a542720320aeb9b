"""Whole answers: packed scores equal a plain reading of the rule, one sentence at a time, in double precision."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from megaprompt.tasks.candidates import best, ranks
from megaprompt.tasks.lama.facts import Fact, Relation, load_data
from megaprompt.tasks.lama.questions import OVER_THE_LIMIT, AskFor, lama_tasks
from megaprompt.tasks.lama.whole_answers import WholeAnswers, _from_the_same_token, examples_of
from tests.tasks.bear_data import CAPITALS, CONTINENTS, MORE_CAPITALS, MORE_CONTINENTS, write_bear

SIZES = [PassSize(16, 16), PassSize(64, 256), PassSize(256, 4096), PassSize(None, 64)]


@pytest.fixture
def bear(tmp_path):
    return load_data(str(write_bear(tmp_path / "bear")))


def tasks_of(data, backbone, ask_for=AskFor(), limit=None, names=(), seed=0):  # noqa: B008 (frozen)
    return lama_tasks(data, backbone, ask_for, names=names, splits=("test",), limit=limit, seed=seed)


def masked_backbone(kind: str, tokens: int = 150) -> Backbone:
    """A small BERT with a WordPiece tokenizer, or a RoBERTa with a byte-level one, both of which split words."""
    facts = [*CAPITALS.items(), *MORE_CAPITALS.items(), *CONTINENTS.items(), *MORE_CONTINENTS.items()]
    words = [*(text for fact in facts for text in fact), "The capital of is in a part known as continent . , : '"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=tokens, special_tokens=special)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=tokens + 200, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(words * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
    config, model = {"bert": (BertConfig, BertForMaskedLM), "roberta": (RobertaConfig, RobertaForMaskedLM)}[kind]
    torch.manual_seed(0)
    made = model._from_config(
        config(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=len(fast),
            max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
        ),
        attn_implementation="sdpa",
    )  # fmt: skip
    return Backbone(made.double(), fast, kind)


# ------------------------------------------------------------------------------------ the rule, as plainly as possible


def sentence_of(wording: str, subject: str, answer: str) -> tuple[str, int]:
    """The sentence, and where the answer starts, with the space before it (which is a token of its own in some)."""
    before = wording[: wording.index("[Y]")].replace("[X]", subject).rstrip()
    text = wording.replace("[X]", subject).replace("[Y]", answer)
    return text[0].upper() + text[1:], len(before)


def plain_causal(backbone: Backbone, sentence: str, start: int, begin: bool) -> float:
    """The log-probabilities of the answer's tokens and those behind them."""
    tokenizer = backbone.tokenization.tokenizer
    found = tokenizer(sentence, return_offsets_mapping=True)
    ids = [tokenizer.eos_token_id] * begin + found["input_ids"]
    first = begin + next(i for i, (_, end) in enumerate(found["offset_mapping"]) if end > start)
    log = backbone.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log[i - 1, ids[i]].item() for i in range(first, len(ids)))


def plain_masked(backbone: Backbone, sentence: str) -> float:
    """Each token masked in turn, with the later ones of its word."""
    tokenizer = backbone.tokenization.tokenizer
    found = tokenizer(sentence)
    ids, words = found["input_ids"], found.word_ids()
    total = 0.0
    for i, word in enumerate(words):
        if word is not None:
            masked = [
                tokenizer.mask_token_id if j >= i and w == word else t
                for j, (t, w) in enumerate(zip(ids, words, strict=True))
            ]
            total += backbone.model(torch.tensor([masked])).logits[0, i].log_softmax(-1)[ids[i]].item()
    return total


def scores_of(backbone, task, template, size, tolerance=1e-9):
    """[facts, candidates] as they come out of packed passes."""
    found = torch.zeros(len(task.examples["test"]), len(task.examples["test"][0].candidates), dtype=torch.float64)

    class Noted(WholeAnswers):
        def answer(self, scores, gold, complete=None):
            noted.append(scores)
            return super().answer(scores, gold, complete)

    noted: list[torch.Tensor] = []
    at = Workplace.shared(backbone, size, World(), task.objective)
    instances = task.instances("test", template)
    for i, instance in enumerate(instances):  # in passes of all, which are looked at below, and one by one here
        [_] = answers(at, [Questions([instance], Noted())], None)
        found[i] = noted.pop()
    [together] = answers(at, [Questions(instances, task.objective)], None)
    gold = torch.tensor([instance.gold for instance in instances])
    alone = task.objective.answer(found, gold)
    for name, values in together.items():
        torch.testing.assert_close(values, alone[name], rtol=tolerance, atol=tolerance)
    return found


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("begin", [False, True])
def test_packed_scores_equal_sentences_one_at_a_time(make_backbone, bear, kind, size, begin):
    backbone = make_backbone(kind)
    for task in tasks_of(bear, backbone, AskFor(begin=begin, needs="all")).values():
        for wording in task.wordings:
            found = scores_of(backbone, task, task.template(wording), size)
            for i, example in enumerate(task.examples["test"]):
                for j, answer in enumerate(example.candidates):
                    sentence, start = sentence_of(wording, example.fields["X"], answer)
                    plain = plain_causal(backbone, sentence, start, begin or start == 0)
                    assert found[i, j].item() == pytest.approx(plain, abs=1e-9), sentence


@torch.no_grad()
@pytest.mark.parametrize("size", [SIZES[1], pytest.param(SIZES[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_packed_pseudo_likelihoods_equal_sentences_one_at_a_time(bear, kind, size):
    backbone = masked_backbone(kind)
    task = tasks_of(bear, backbone)["P36"]
    assert any(
        len(ids) > 1 for ids in backbone.tokenization.encode([f" {a}" for a in CAPITALS.values()], is_start=False)
    )
    for wording in task.wordings:
        found = scores_of(backbone, task, task.template(wording), size)
        for i, example in enumerate(task.examples["test"][:2]):
            for j, answer in enumerate(example.candidates):
                sentence, _ = sentence_of(wording, example.fields["X"], answer)
                assert found[i, j].item() == pytest.approx(plain_masked(backbone, sentence), abs=1e-9), sentence


def test_equal_beginnings_are_computed_and_read_once(make_backbone, bear):
    backbone = make_backbone()
    task = tasks_of(bear, backbone)["P36"]
    [instance] = task.instances("test", task.manual_template)[:1]
    beginnings = {query.tokens[: target + 1] for query in instance.queries for target in query.targets}
    nodes = {query.tokens[:length] for query in instance.queries for length in range(1, 1 + len(query.tokens))}
    batch = pack(instance.queries, 1000)
    assert batch.targets.numel() == len(beginnings) < batch.target_of_query.numel()
    assert batch.token_ids.numel() == len(nodes)
    assert len({query.targets[0] for query in instance.queries}) == 1
    first = torch.cumsum(torch.tensor([0, *(len(query.targets) for query in instance.queries)]), 0)[:-1]
    assert len(set(batch.target_of_query[first].tolist())) == 1  # the answer's first token is read at one node


def test_masked_sentences_that_differ_only_where_they_are_masked_are_computed_once():
    task = tasks_of(
        _relation_data("The capital of [X] is [Y].", {"France": "Paris", "Italy": "Rome"}), masked_backbone("bert", 600)
    )["P36"]
    queries = [query for instance in task.instances("test", task.manual_template) for query in instance.queries]
    distinct = {query.tokens for query in queries}
    assert len(distinct) < len(queries)
    assert pack(queries, 1000).token_ids.numel() == sum(map(len, distinct))


def _relation_data(template, pairs, **more):
    class OneRelation:
        name = "made up"

        def select(self, names):
            facts = {"train": [], "dev": [], "test": [Fact(*pair) for pair in pairs.items()]}
            return [Relation("P36", "capital", "", template, facts, **more)]

    return OneRelation()


# ----------------------------------------------------------------------------------------------- candidates and answers


def test_candidates_are_the_answer_space_or_the_objects(make_backbone, bear):
    encoder = make_backbone().text_encoder()
    found = examples_of(bear.relations["P36"], encoder)
    assert {example.candidates for example in found["test"]} == {tuple(CAPITALS.values())}
    assert {e.candidates for e in found["dev"]} == {tuple(sorted(e.answer for e in found["dev"]))}
    for split in ("train", "dev", "test"):
        assert all(example.candidates[example.gold] == example.answer for example in found[split])
    facts = {"train": [Fact("Peru", "Lima")], "dev": [], "test": [Fact("Cuba", "Havana"), Fact("Fiji", "Havana ")]}
    found = examples_of(Relation("P36", "", "", None, facts), encoder)
    assert found["train"][0].candidates == found["test"][0].candidates == ("Havana", "Lima")
    assert [example.gold for example in found["test"]] == [0, 0], "the same tokens are one candidate"


def test_ranks_and_best_answers():
    scores = torch.tensor([[0.0, 1.0, 1.0, -1.0], [2.0, -torch.inf, 1.0, -torch.inf]])
    assert ranks(scores, torch.tensor([1, 0])).tolist() == [2, 1], "of equal scores, the others are first"
    places, values = best(scores, 6)
    assert places.shape == (2, 6)
    assert (places[0, 2:].tolist(), places[1].tolist()) == ([0, 3, -1, -1], [0, 2, -1, -1, -1, -1])
    torch.testing.assert_close(values[1, :2].exp(), torch.tensor([2.0, 1.0]).softmax(0))


def test_what_is_told_of_an_answer(make_backbone, bear):
    backbone = make_backbone()
    task = tasks_of(bear, backbone)["P36"]
    at = Workplace.shared(backbone, SIZES[1], World(), task.objective)
    [found] = answers(at, [Questions(task.instances("test", task.manual_template), task.objective)], None)
    line = task.objective.describe(task.examples["test"][4], found, 4)
    assert (line["subject"], line["object"]) == ("South Korea", "Seoul city")
    assert len(line["top"]) == len(CAPITALS)
    assert sum(p for _, p in line["top"]) == pytest.approx(1, abs=1e-5)
    assert line["top"][line["rank"] - 1] == ["Seoul city", pytest.approx(line["probability"], abs=1e-6)]


def test_majority_goes_by_text(bear, make_backbone):
    tasks = tasks_of(bear, make_backbone())
    examples = {name: task.examples for name, task in tasks.items()}
    majority = {name: tasks[name].objective.majority(e["train"], e["test"])["p_at_1"] for name, e in examples.items()}
    assert majority == {"P36": 0.0, "P30": 0.25}  # no capital of train is one of test; Europe is the usual continent


def test_facts_that_each_way_to_answer_can_use(bear, make_backbone):
    task = tasks_of(bear, make_backbone(), limit=5)["P36"]
    assert (len(task.examples["test"]), task.left_out[OVER_THE_LIMIT]) == (
        5,
        3 + len(MORE_CAPITALS) - 5 - len(task.examples["dev"]),
    )
    one = sum(token is not None for token in make_backbone().tokenization.single_tokens(list(CAPITALS.values())))
    assert task.usable == {"token": one, "candidates": len(CAPITALS)}
    assert 0 < one < len(CAPITALS)


def test_a_beginning_of_text_token_on_request(bear, make_backbone):
    backbone = make_backbone()
    end = backbone.tokenization.tokenizer.eos_token_id
    for begin, wording, expected in ((False, 0, False), (True, 0, True), (False, 1, True)):
        task = tasks_of(bear, backbone, AskFor(begin=begin))["P36"]
        template = task.template(task.wordings[wording])
        for query in task.instance(task.examples["test"][0], template).queries:
            assert (query.tokens[0] == end) == expected
    same = backbone.tokenization.tokenizer.backend_tokenizer
    backbone.tokenization.tokenizer = PreTrainedTokenizerFast(tokenizer_object=same)
    with pytest.raises(UsageError, match="--bos always: the tokenizer of llama has no beginning-of-text token"):
        tasks_of(bear, backbone, AskFor(begin=True))


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("learn_by", ["answer", "candidates"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_losses_and_gradients_equal_the_plain_ones(make_backbone, bear, kind, learn_by):
    backbone = masked_backbone("bert") if kind == "bert" else make_backbone(kind)
    task = tasks_of(bear, backbone, AskFor(learn_by=learn_by))["P36"]
    template = task.template("<2>[X]<1>[Y]<1>.")
    torch.manual_seed(0)
    prompts = torch.randn(4, backbone.hidden_size, dtype=torch.float64, requires_grad=True)
    instances = task.training_instances(template)[:3]
    at = Workplace.shared(backbone, SIZES[1], World(), task.objective)
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    losses = backward_passes(
        at, prompts, [Questions(instances, task.objective)], weights, lambda loss, _: loss.backward()
    )

    expected = []
    for instance, example in zip(instances, task.examples["train"], strict=False):
        scores: dict[int, torch.Tensor] = {}
        for query, candidate in zip(instance.queries, instance.candidates, strict=True):
            ids = torch.tensor(query.tokens)
            vectors = backbone.model.get_input_embeddings()(ids.clamp(min=0))
            vectors = torch.where((ids < 0)[:, None], prompts[(-1 - ids).clamp(min=0)], vectors)[None]
            log = backbone.model(inputs_embeds=vectors).logits[0].log_softmax(-1)
            score = sum(log[t, label] for t, label in zip(query.targets, query.labels, strict=True))
            scores[candidate] = scores.get(candidate, 0) + score
        if learn_by == "answer":
            assert list(scores) == [0]
            expected.append(-scores[0])
        else:
            assert len(scores) == len(example.candidates), "there are no more than 16"
            expected.append(-torch.stack([scores[c] for c in sorted(scores)]).log_softmax(0)[0])
    (gradient,) = torch.autograd.grad(torch.stack(expected).mean(), prompts)
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prompts.grad, gradient, rtol=1e-9, atol=1e-11)


def test_training_compares_with_a_sample_of_others(bear, make_backbone, monkeypatch):
    backbone = make_backbone()
    monkeypatch.setattr("megaprompt.tasks.lama.whole_answers._OTHERS", 3)
    first, again, other = (
        [len(i.queries) and i.queries for i in tasks_of(bear, backbone, seed=seed)["P36"].training_instances(
            tasks_of(bear, backbone)["P36"].bare_template
        )]
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == again != other
    assert {len(queries) for queries in first} == {4}
    assert [queries[0] for queries in first] == [queries[0] for queries in other], "the right answer comes first"


def test_templates_of_whole_answers_end_with_a_full_stop(bear, make_backbone):
    task = tasks_of(bear, make_backbone())["P36"]
    assert task.default_template(causal=True).text == "<3>[X]<3>[Y]."
    assert task.bare_template.text == "[X] [Y]."
    template, tokens = task.manual_with_pseudo_tokens()
    assert template.text == f"<{len(tokens) - 1}>[X]<1>[Y]."
    masked = tasks_of(bear, masked_backbone("bert"))["P36"]
    assert masked.default_template(causal=False).text == "<3>[X]<3>[Y]<3>"


def test_all_answers_are_scored_from_the_same_token():
    """Where a mark touches the answer from before, some answers share a token with it."""
    marked = Query((1, 2, 3, 4), (1, 2), (3, 4))  # 2 is the mark
    joined = Query((1, 9, 4), (0, 1), (9, 4))  # 9 is the mark with the answer's first letter
    found = _from_the_same_token([marked, joined, marked])
    assert found == [Query((1, 2, 3, 4), (0, 1, 2), (2, 3, 4)), joined, Query((1, 2, 3, 4), (0, 1, 2), (2, 3, 4))]
