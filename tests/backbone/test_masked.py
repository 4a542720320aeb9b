"""Masked language models: packed equals plain in double precision, the whole job runs, and prompts are learned."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForMaskedLM,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    EsmConfig,
    FlaubertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMConfig,
)

from megaprompt.backbone import Backbone, inspect_backbone, load_backbone
from megaprompt.backbone.packed import language_model
from megaprompt.config import ProbeConfig
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize, pack, split_into_passes
from megaprompt.prompting.query import Query, TextEncoder
from megaprompt.prompting.template import Template, default_template
from megaprompt.resources.profile import Workload, profile, shape_of
from megaprompt.run.job import probe
from megaprompt.tasks.lama.facts import SPLITS, load_data
from tests.conftest import PAIRS, TEMPLATES, plain_logits, run_cli
from tests.distributed.test_distributed import CONFIGS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {
    "bert": (BertConfig, BertForMaskedLM, {}),
    "roberta": (RobertaConfig, RobertaForMaskedLM, {"pad_token_id": 1, "type_vocab_size": 1}),
    "albert": (AlbertConfig, AlbertForMaskedLM, {"embedding_size": 16}),
}


def word_tokenizer(texts) -> PreTrainedTokenizerFast:
    """A token for each word, and BERT's special tokens around each text."""
    words = dict.fromkeys(word for text in texts for word in text.split())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "a", *(w for w in words if w != "a")])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)


@pytest.fixture(scope="module")
def tokenizer():
    facts = [f"{s} {o}" for pairs in PAIRS.values() for s, o in pairs]
    return word_tokenizer([*facts, *(t.replace("[X]", "").replace("[Y]", "") for t in TEMPLATES.values())])


def small_model(kind: str, vocabulary: int):
    torch.manual_seed(0)
    config, model, more = KINDS[kind]
    made = model._from_config(config(**SMALL | more, vocab_size=vocabulary), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in made.parameters():  # biases too, which start as zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.fixture
def make_backbone(tokenizer):
    return lambda kind: Backbone(small_model(kind, len(tokenizer)).double(), tokenizer, kind)


@pytest.fixture(params=list(KINDS))
def directory(request, tokenizer, tmp_path) -> Path:
    small_model(request.param, len(tokenizer)).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


# ------------------------------------------------------------------------------------------------------------ templates


def test_the_mask_stands_for_the_object():
    encoder = TextEncoder(lambda text, is_start: [len(word) + 100 for word in text.split()], (2,), mask=4, suffix=(3,))
    query = Template.parse(default_template(causal=False)).render({"X": "South Korea"}, encoder)
    assert query == Query((2, -1, -2, -3, 105, 105, -4, -5, -6, 4, -7, -8, -9, 3), (9,), bidirectional=True)
    query = Template.parse("[Y] is the capital of [X] .").render({"X": "Peru"}, encoder)
    assert query == Query((2, 4, 102, 103, 107, 102, 104, 101, 3), (1,), bidirectional=True)


def test_special_tokens_are_the_models_own(make_backbone):
    backbone = make_backbone("bert")
    query = Template.parse("The capital of [X] is [Y] .").render({"X": "South Korea"}, backbone.text_encoder())
    assert backbone.tokenization.tokenizer.decode(query.tokens) == "[CLS] The capital of South Korea is [MASK] . [SEP]"
    assert query.tokens[query.targets[0]] == backbone.tokenization.tokenizer.mask_token_id


def test_a_tokenizer_without_mask_token_is_named(make_backbone, tokenizer):
    backbone = make_backbone("bert")
    backbone.tokenization.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]"
    )
    with pytest.raises(MegapromptError, match="the tokenizer of bert has no mask token"):
        backbone.text_encoder()


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("row_tokens", [16, 64, 200])
@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_and_gradients_equal_the_plain_forward(make_backbone, kind, row_tokens):
    backbone = make_backbone(kind)
    encoder = backbone.text_encoder()
    template = Template.parse("<3> [X] capital <2>[Y]<1> .")
    queries = [template.render({"X": subject}, encoder) for subject, _ in PAIRS["P36"]]
    queries += [Template.parse(TEMPLATES["P36"]).render({"X": subject}, encoder) for subject, _ in PAIRS["P36"][:4]]
    prompts = torch.randn(6, backbone.embedding_size, dtype=torch.float64, requires_grad=True)
    batch = pack(queries, row_tokens)
    packed = backbone(batch, prompts)[batch.target_of_query]
    weights = torch.randn_like(packed)
    (gradient,) = torch.autograd.grad((packed * weights).sum(), prompts)

    plain = plain_logits(backbone, queries, prompts)  # the model's own positions, segments and mask
    (expected,) = torch.autograd.grad((plain * weights).sum(), prompts)
    torch.testing.assert_close(packed, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", list(KINDS))
def test_heads_are_as_wide_as_hidden_states(make_backbone, kind):
    """ALBERT's input vectors are not."""
    backbone = make_backbone(kind)
    batch = pack([Query((2, 7, 4, 3), (0, 2), bidirectional=True)], 16)
    states = backbone(batch, None, "hidden")
    assert states.shape == (2, backbone.hidden_size) == (2, 32)
    prompts = torch.zeros(1, backbone.embedding_size, dtype=torch.float64)
    asked = pack([Query((2, -1, 4, 3), (2,), bidirectional=True)], 16)
    assert backbone(asked, prompts).shape[1] == backbone.vocabulary_size


def test_rows_are_blocks_and_equal_queries_are_computed_once():
    queries = [
        Query((2, -1, 7, 4, 3), (3,), bidirectional=True),
        Query((2, -1, 8, 4, 3), (3,), bidirectional=True),
        Query((2, -1, 7, 4, 3), (3,), bidirectional=True),
    ]
    batch = pack(queries, 64)
    assert batch.token_ids.shape == (1, 10)
    assert torch.equal(batch.attention_mask()[0, 0], torch.block_diag(*[torch.ones(5, 5)] * 2).bool())
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4] * 2]
    assert batch.target_of_query[0] == batch.target_of_query[2] != batch.target_of_query[1]
    assert [len(part) for part in split_into_passes([(query,) for query in queries], PassSize(5, 5))] == [2, 1]


# -------------------------------------------------------------------------------------------------------------- the job


@pytest.mark.slow
def test_the_whole_job(directory, data_directory, tmp_path):
    methods = ("manual", "p-tuning", "fine-tuning", "manual+fine-tuning")
    config = ProbeConfig(
        backbone=str(directory), data=str(data_directory), methods=methods, learning_rate=0.01, fine_tuning_rate=0.003,
        max_epochs=15, out=tmp_path / "run",
    )  # fmt: skip
    results = probe(config)
    macro = {method: results["methods"][method]["macro"]["p_at_1"] for method in results["methods"]}
    assert min(macro["p-tuning"], macro["fine-tuning"]) > macro["manual"]  # the facts of all splits are the same
    assert results["methods"]["p-tuning"]["relations"]["P36"]["template"] == default_template(causal=False)
    backbone = load_backbone(str(directory))
    assert not backbone.causal
    assert backbone.exact_size(PassSize()) == PassSize()


def test_a_model_that_ignores_masks_is_refused(make_backbone, monkeypatch):
    backbone = make_backbone("bert")  # which sees the padding, too
    forward = backbone.model.forward
    monkeypatch.setattr(backbone.model, "forward", lambda **inputs: forward(**{**inputs, "attention_mask": None}))
    with pytest.raises(MegapromptError, match="does not compute queries exactly"):
        backbone.exact_size(PassSize())


RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
OTHERS = {  # with the row_tokens that come out
    "deberta": (DebertaV2Config, RELATIVE, None),
    "xlm": (XLMConfig, {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, None),
    "mpnet": (MPNetConfig, {}, 64),  # without PyTorch's fused attention
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_computed_exactly(tokenizer, data_directory, tmp_path, kind):
    torch.manual_seed(0)
    config, more, row_tokens = OTHERS[kind]
    made = config(**SMALL | more, vocab_size=len(tokenizer))
    assert language_model(made) is AutoModelForMaskedLM
    AutoModelForMaskedLM.from_config(made).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    backbone = load_backbone(str(tmp_path / kind), torch.float64)
    size = backbone.exact_size(PassSize(64, 64))
    assert size == PassSize(row_tokens, 64)
    template = Template.parse("<1> [X] capital <2>[Y] .")
    queries = [template.render({"X": subject}, backbone.text_encoder()) for subject, _ in PAIRS["P36"]]
    prompts = torch.randn(3, backbone.embedding_size, dtype=torch.float64)
    batch = pack(queries, row_tokens)
    found = backbone(batch, prompts)[batch.target_of_query]
    torch.testing.assert_close(found, plain_logits(backbone, queries, prompts), rtol=1e-5, atol=1e-5)

    config = ProbeConfig(
        backbone=str(tmp_path / kind), data=str(data_directory), methods=("manual", "p-tuning"), learning_rate=0.01,
        max_epochs=10, out=tmp_path / "run",
    )  # fmt: skip
    macro = {name: method["macro"]["mrr"] for name, method in probe(config)["methods"].items()}
    assert macro["p-tuning"] > macro["manual"]


@pytest.mark.parametrize("config", [BartConfig, EsmConfig])  # wants a text for its decoder; rescales masked texts
def test_other_models_are_refused(tokenizer, config):
    torch.manual_seed(0)
    made = AutoModelForMaskedLM.from_config(config(**SMALL, vocab_size=len(tokenizer)))
    with pytest.raises(MegapromptError, match=r"backbone other .* does not compute queries exactly"):
        Backbone(made, tokenizer, "other").exact_size(PassSize())


@pytest.mark.parametrize("name", ["XLMWithLMHeadModel", "FlaubertWithLMHeadModel", "BertForMaskedLM", "BertModel"])
def test_masked_models_are_known_by_their_name(name):
    config = XLMConfig if name.startswith("XLM") else FlaubertConfig if name.startswith("F") else BertConfig
    assert language_model(config(architectures=[name])) is AutoModelForMaskedLM


def test_a_checkpoint_without_output_layer_is_refused(make_backbone, tokenizer, tmp_path):
    make_backbone("bert").model.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"of its weights are missing, such as cls\.predictions"):
        load_backbone(str(tmp_path))


def test_prompts_are_as_wide_as_embeddings(directory):
    loaded = load_backbone(str(directory))
    assert inspect_backbone(str(directory))[:2] == (loaded.embedding_size, sum(p.numel() for p in loaded.parameters()))


@pytest.mark.parametrize(("name", "parameters"), [("bert-base", 108_340_804), ("roberta-base", 124_697_433)])
def test_built_in_shapes(name, parameters):
    """The published counts of BertForMaskedLM (cased) and RobertaForMaskedLM."""
    config = shape_of(name)
    work = Workload.of(config, "p-tuning", 1, PassSize(32, 32))
    assert not work.causal
    assert profile(config, torch.float32, work).parameters == parameters


@pytest.mark.slow
def test_zero3_changes_nothing(directory, data_directory, tmp_path):
    options = ("probe", "--backbone", directory, "--data", data_directory, "--max-epochs", 3)
    weights = load_file(directory / "model.safetensors")  # with the names that are in BERT's published checkpoints
    old = {".weight": ".gamma", ".bias": ".beta"}
    for name in [name for name in weights if re.search(r"LayerNorm\.(weight|bias)$", name)]:
        head, dot, tail = name.rpartition(".")
        weights[head + old[dot + tail]] = weights.pop(name)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    alone = run_cli(*options, "--out", tmp_path / "alone")
    sharded = run_cli(*options, "--out", tmp_path / "sharded", "--deepspeed", CONFIGS / "zero3.json")
    assert alone.returncode == sharded.returncode == 0, sharded.stderr
    one, other = (
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("alone", "sharded")
    )
    assert one == pytest.approx(other, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- learning

WORDINGS = {
    "P36": ("[Y] is the seat of government in [X] .", "[X] : capital [Y] .", "its capital [Y] makes [X] well known ."),
    "P30": ("[X] lies in [Y] .", "[X] : continent [Y] .", "in [Y] one finds the country [X] ."),
    "P37": ("people in [X] speak [Y] .", "[X] : language [Y] .", "[Y] is spoken in [X] ."),
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A small BERT, trained from scratch on sentences about all facts, none of which is worded as a manual prompt."""
    data = load_data("world")
    relations = data.select(tuple(WORDINGS))
    sentences = [
        wording.replace("[X]", fact.subject).replace("[Y]", f"<{fact.object}>")
        for relation in relations
        for split in SPLITS
        for fact in relation.facts[split]
        if " " not in fact.object
        for wording in WORDINGS[relation.id]
    ]
    manual = [relation.template.replace("[X]", "").replace("[Y]", "") for relation in relations]
    tokenizer = word_tokenizer([*(s.replace("<", "").replace(">", "") for s in sentences), *manual])
    rows, labels = [], []
    for sentence in sentences:
        words = sentence.split()
        ids = tokenizer(" ".join(word.strip("<>") for word in words))["input_ids"]
        rows.append(torch.tensor(ids))
        gold = torch.full((len(ids),), -100)
        target = next(i for i, word in enumerate(words) if word.startswith("<")) + 1
        gold[target] = ids[target]
        rows[-1][target] = tokenizer.mask_token_id
        labels.append(gold)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    for step in range(1000):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, (1000 - step) / 950)
        batch = torch.randint(len(ids), (64,))
        model(input_ids=ids[batch], attention_mask=(ids[batch] != 0).long(), labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("taught")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_learned_prompts_beat_manual_ones_on_facts_that_they_have_not_seen(taught, tmp_path, seed):
    config = ProbeConfig(
        backbone=str(taught), relations=tuple(WORDINGS), learning_rate=0.003, max_steps=200, seed=seed,
        out=tmp_path / "run",
    )  # fmt: skip
    results = probe(config)
    macro = {method: results["methods"][method]["macro"]["p_at_1"] for method in results["methods"]}
    print(
        {
            n: {m: round(r["p_at_1"], 3) for m in macro for r in [results["methods"][m]["relations"][n]]}
            for n in WORDINGS
        }
    )
    assert macro["p-tuning"] > macro["manual"] + 0.1
    assert macro["p-tuning"] > macro["majority"] + 0.1
