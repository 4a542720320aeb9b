"""Vocabularies shared by small tokenizers of every kind, from the command line to the ids that are allowed."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megaprompt.backbone import Tokenization, load_backbone, load_tokenizer
from megaprompt.cli import main
from megaprompt.errors import MegapromptError
from megaprompt.tasks.lama.facts import SPLITS, load_data, read_vocabulary
from megaprompt.tasks.lama.questions import load_vocabulary
from megaprompt.tasks.lama.vocabulary import Count, beside_lama, common_words, count_facts
from tests.conftest import PAIRS, make_model, write_facts
from tests.tasks.test_facts import SHARED

CITIES = ["Paris", "Rome", "Oslo", "Köln"]
TEXT = [f"a {city} is the capital of Europe" for city in CITIES] * 30


def wordpiece(words, lowercase=False) -> PreTrainedTokenizerFast:
    """BERT's kind: a word stands for itself, ## continues it."""
    letters = sorted(set("".join(words).lower() if lowercase else "".join(words)) | {"a"})
    pieces = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", *letters, *("##" + letter for letter in letters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def byte_level(text=TEXT) -> PreTrainedTokenizerFast:
    """GPT-2's and RoBERTa's kind: a word starts with Ġ."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece(words) -> PreTrainedTokenizerFast:
    """ALBERT's and T5's kind: a unigram model in which a word starts with ▁."""
    letters = sorted(set("".join(words)) | {"a"})
    pieces = [("<unk>", 0.0), ("▁", -5.0), ("▁a", -2.0), *((letter, -9.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *(("▁" + word, -3.0) for word in words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def llama(text=TEXT) -> PreTrainedTokenizerFast:
    """Llama's kind: a BPE without pre-tokenizer, in which ▁ is put before the text and in place of every space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"])
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


KINDS = {
    "wordpiece": (lambda: wordpiece([*CITIES, "Lima", "is"]), "{}"),
    "byte_level": (byte_level, "Ġ{}"),
    "sentencepiece": (lambda: sentencepiece([*CITIES, "Cairo", "is"]), "▁{}"),
    "llama": (llama, "▁{}"),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory with tokenizer and model of each kind, as a user has it."""
    found = {}
    for kind, (make, _) in KINDS.items():
        path = found[kind] = tmp_path_factory.mktemp(kind)
        tokenizer = make()
        tokenizer.save_pretrained(path)
        make_model("llama", len(tokenizer)).save_pretrained(path)
    return found


def surface(kind: str, word: str) -> str:
    """The entry of a kind's vocabulary that is the word in mid-sentence."""
    written = word
    if kind == "byte_level":  # bytes as letters
        [(written, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
    return KINDS[kind][1].format(written)


@pytest.mark.parametrize("kind", KINDS)
def test_words_have_the_right_ids_in_every_kind(directories, kind):
    tokenizer = load_tokenizer(str(directories[kind]))
    ids = tokenizer.single_tokens([*CITIES, "Reykjavik", "Paris Rome"])
    entries = tokenizer.tokenizer.get_vocab()
    assert ids == [*(entries[surface(kind, city)] for city in CITIES), None, None]
    assert [tokenizer.text_of(i) for i in ids[: len(CITIES)]] == CITIES


def test_the_rest_of_a_word_is_no_new_word():
    letters = "0a vik's."
    tokenizers = {
        "wordpiece": (wordpiece([*letters.replace(" ", ""), "##vik"]), ["##vik"]),
        "byte_level": (byte_level([letters + "vik"] * 9), ["vik"]),
        "sentencepiece": (sentencepiece([*letters.replace(" ", ""), "vik"]), ["v", "i", "k"]),
        "llama": (llama(["0 1 vik"] * 9), ["vik"]),
    }
    for kind, (tokenizer, expected) in tokenizers.items():
        [rest], [word] = (Tokenization(tokenizer, kind).encode([text], is_start=False) for text in ("vik", " vik"))
        assert tokenizer.convert_ids_to_tokens(rest) == expected, kind
        assert rest != word, kind


def test_the_intersection_filters_and_ranks_the_same_words_in_every_kind(directories, tmp_path):
    out = tmp_path / "vocab" / "common.txt"
    backbones = ",".join(map(str, directories.values()))
    assert main(["data", "vocabulary", "--backbones", backbones, "--out", str(out)]) == 0
    words = read_vocabulary(out)
    assert words == sorted([*CITIES, "is"]), "not Lima or Cairo, which only one of them has"
    data = load_data("world")
    for kind, directory in directories.items():
        backbone = load_backbone(str(directory))
        allowed = load_vocabulary(str(out), data, backbone.tokenization).allowed.nonzero().flatten().tolist()
        entries = backbone.tokenization.tokenizer.get_vocab()
        assert sorted(allowed) == sorted(entries[surface(kind, word)] for word in words)
        assert sorted(backbone.tokenization.text_of(i) for i in allowed) == words


def test_only_tokenizers_are_loaded(directories, tmp_path):
    path = tmp_path / "tokenizer only"
    load_tokenizer(str(directories["wordpiece"])).tokenizer.save_pretrained(path)
    assert not list(path.glob("*.safetensors"))
    assert set(CITIES) <= set(common_words([load_tokenizer(str(path))]))


def test_one_backbone_alone_gives_its_whole_words():
    words = common_words([Tokenization(wordpiece([*CITIES, "U.S.", "…"]), "bert")])
    assert set(CITIES) <= set(words)
    assert not [word for word in words if word.startswith(("##", "["))], "pieces and special tokens are no words"
    assert "…" not in words
    assert "U.S." not in words, "its tokenizer never makes this token"


def test_candidates_limit_the_words(directories, tmp_path, capsys):
    given, out = tmp_path / "lama.txt", tmp_path / "out.txt"
    given.write_text("Rome\nOslo\nLima\n<eos>\n[MASK]\n")
    options = ["--backbones", f"{directories['byte_level']},{directories['wordpiece']}", "--words", str(given)]
    assert main(["data", "vocabulary", *options, "--out", str(out)]) == 0
    assert out.read_text() == "Oslo\nRome\n"
    assert "2 words that are one token" in capsys.readouterr().out
    given.write_text("Reykjavik\n")
    assert main(["data", "vocabulary", *options, "--out", str(out)]) == 2
    assert "no word is one token" in capsys.readouterr().err
    assert out.read_text() == "Oslo\nRome\n"


def test_a_lowercasing_tokenizer_does_not_cost_capitals():
    cased, uncased = Tokenization(wordpiece(CITIES), "cased"), Tokenization(wordpiece(["paris"], lowercase=True), "un")
    assert "Paris" in common_words([cased, uncased])
    assert common_words([uncased, cased]) == common_words([cased, uncased])


def test_words_that_a_tokenizer_joins_are_left_out_and_refused_in_prompts():
    tokenizer = Tokenizer(models.WordLevel({"aParis": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(" P", "P")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    joins = Tokenization(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"), "joins")
    assert joins.single_tokens(["Paris", "b", "unknown"]) == [None, 2, None]
    with pytest.raises(MegapromptError, match="joins 'Paris' to the word before it"):
        joins.encode([" b", " Paris"], is_start=False)


def test_unknown_backbone(tmp_path, capsys):
    assert main(["data", "vocabulary", "--backbones", "no/such-model", "--out", str(tmp_path / "x")]) == 2
    assert "backbone no/such-model: its tokenizer cannot be loaded" in capsys.readouterr().err
    assert main(["data", "count", "--backbone", "x.gguf"]) == 2
    assert main(["data", "vocabulary", "--backbones", ",", "--out", str(tmp_path / "x")]) == 2


# ------------------------------------------------------------------------------------------------------------ counting


def test_counts_are_what_a_run_uses(backbone_directory, data_directory, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("Paris\nRome\nEurope\n")
    write_facts(data_directory / "trex" / "test" / "P36.jsonl", [*PAIRS["P36"][:3], ("Nepal", "Kathmandu")])
    where = ["--data", str(data_directory), "--vocab", str(words), "--backbone", str(backbone_directory)]
    assert main(["probe", *where, "--methods", "manual", "--out", str(tmp_path / "run")]) == 0
    about = json.loads((tmp_path / "run" / "results.json").read_text())["data"]["relations"]
    counts = count_facts(load_data(str(data_directory)), str(words), load_tokenizer(str(backbone_directory)))
    assert counts["P36"].facts == {"train": 13, "dev": 13, "test": 4}
    assert counts["P36"].remaining == {"train": 2, "dev": 2, "test": 2}
    for name, count in counts.items():
        assert count.remaining == about[name]["facts"]
        assert count.left_out == about[name]["left_out"]
    capsys.readouterr()
    assert main(["data", "count", *where]) == 0
    text = capsys.readouterr().out
    assert "2 of 4" in text
    assert "7 of 13" in text, "test facts of both relations: P30 has five in Europe"
    assert "LAMA" not in text, "this is not LAMA"


def count(facts: int, remaining: int) -> Count:
    rest = dict.fromkeys(SPLITS, 0)
    return Count("capital", {**rest, "test": facts}, {**rest, "test": remaining}, {})


def test_beside_the_published_totals():
    counts = {f"P{i}": count(830, 700) for i in range(41)}
    assert beside_lama(counts).startswith("34030 test facts, -9 compared with the 34039 published")
    counts["P0"] = count(839, 700)
    assert beside_lama(counts).startswith("34039 test facts, as published for LAMA-34k; 28700 remain")
    del counts["P0"]
    assert beside_lama(counts) is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the LAMA data is not part of the project")
def test_counts_on_lama_facts():
    data = load_data(str(SHARED))
    cities = {fact.object for fact in data.relations["P20"].facts["test"]}
    tokenizer = Tokenization(wordpiece(sorted(city for city in cities if city.isalpha())), "cities")
    counts = count_facts(data, "auto", tokenizer)
    facts, remaining = (sum(getattr(c, kind)["test"] for c in counts.values()) for kind in ("facts", "remaining"))
    assert 0 < remaining < facts == sum(len(r.facts["test"]) for r in data.relations.values())
    for name, c in counts.items():
        assert sum(c.facts.values()) == sum(c.remaining.values()) + sum(c.left_out.values()), name
