"""The Megatron bridge: merged parts give the described model, damage and danger are refused, packing stays exact."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaprompt.backbone import fairseq_bridge, load_backbone
from megaprompt.backbone.fairseq_bridge import convert, convert_back
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from tests.backbone.megatron_parts import WORDS, plain_logits, random_model, write_checkpoint, write_dictionaries

ROWS = 96  # 80 symbols, padded


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(parts, **options)` writes one; returns its directory and the whole model."""

    def make(parts=2, name="source", dtype=torch.float32, change=None, **options):
        model = random_model(ROWS, dtype)
        if change:
            change(model)
        write_dictionaries(tmp_path / name, padding=3)
        return write_checkpoint(tmp_path / name, model, parts, **options), model

    return make


def load(path, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "legacy"])
def test_merged_parts_are_the_described_model(checkpoint, tmp_path, parts, zip_file):
    source, model = checkpoint(parts, zip_file=zip_file, cfg=zip_file)
    convert(source, tmp_path / "out")
    converted = load(tmp_path / "out")
    ids = torch.randint(4, WORDS, (9,), generator=torch.Generator().manual_seed(1))
    expected = plain_logits(model, ids)[:, :WORDS]
    got = converted(ids[None]).logits[0]
    assert got.shape == expected.shape  # padding rows are gone
    assert (got - expected).norm() < 1e-7 * expected.norm()  # positions are float32
    embeddings = model["decoder.embed_tokens.weight"].double()[ids].requires_grad_()
    others = embeddings.detach().clone().requires_grad_()
    plain_logits(model, embeddings=embeddings)[:, :WORDS].logsumexp(-1).sum().backward()
    converted(inputs_embeds=others[None]).logits.logsumexp(-1).sum().backward()
    assert (embeddings.grad - others.grad).norm() < 1e-7 * embeddings.grad.norm()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["parts"]) == parts
    assert manifest["padding_rows_dropped"] == 3


def test_packing_is_exact(checkpoint, tmp_path):
    convert(checkpoint()[0], tmp_path / "out")
    backbone = load_backbone(str(tmp_path / "out"), torch.float64)
    assert backbone.exact_size(PassSize(32, 64)) == PassSize(32, 64)
    queries = [Query(tokens, (len(tokens) - 1,)) for tokens in ((-1, -2, 7, 8), (-1, -2, 7, 9, 10), (-1, -2, 11))]
    prompts = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    batch = pack(queries, 64)
    together = backbone(batch, prompts)[batch.target_of_query]
    (gradient,) = torch.autograd.grad(together.logsumexp(-1).sum(), prompts)
    weights = backbone.model.get_input_embeddings().weight
    alone = []
    for query in queries:
        rows = [prompts[-1 - t] if t < 0 else weights[t] for t in query.tokens]
        alone.append(backbone.model(inputs_embeds=torch.stack(rows)[None]).logits[0, query.targets[0]])
    expected = torch.stack(alone)
    assert (together - expected).norm() < 1e-12 * expected.norm()
    (reference,) = torch.autograd.grad(expected.logsumexp(-1).sum(), prompts)
    assert (gradient - reference).norm() < 1e-10 * reference.norm()


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_round_trip(checkpoint, tmp_path, parts):
    source, _ = checkpoint(4)
    convert(source, tmp_path / "out")
    convert_back(tmp_path / "out", tmp_path / "back", parts)
    convert(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UsageError, match="--parts 3"):
        convert_back(tmp_path / "out", tmp_path / "three", 3)


def test_half_precision_and_other_types(checkpoint, tmp_path):
    source, model = checkpoint(2, dtype=torch.float16)
    convert(source, tmp_path / "same")
    assert load(tmp_path / "same", "auto").dtype == torch.float16
    convert(source, tmp_path / "wide", dtype="bfloat16")
    converted = load(tmp_path / "wide", "auto")
    wanted = model["decoder.layers.1.fc2.weight"].to(torch.bfloat16)
    assert torch.equal(converted.model.layers[1].fc2.weight, wanted)


def test_interrupted_conversion_goes_on(checkpoint, tmp_path, monkeypatch):
    source, _ = checkpoint(4)
    convert(source, tmp_path / "whole")
    write_part, seen = fairseq_bridge._write_part, []

    def stop_at_2(path, number, *rest):
        seen.append(number)
        if number == 2 and len(seen) == 3:
            raise KeyboardInterrupt
        write_part(path, number, *rest)

    monkeypatch.setattr(fairseq_bridge, "_write_part", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
    assert seen == [0, 1, 2, 2, 3]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "out" / "conversion.json").exists()


def test_an_interruption_leaves_no_joined_tensor_behind(checkpoint, tmp_path, monkeypatch):
    source, _ = checkpoint(4)
    convert(source, tmp_path / "whole")
    unlink = Path.unlink

    def interrupted(path, *rest, **more):
        if path.name == "joined-1.bin":
            raise KeyboardInterrupt
        unlink(path, *rest, **more)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / ".out.partial" / "joined-1.bin").exists()
    convert(source, tmp_path / "out")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "out")]
    assert names[0] == names[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-not-exist",)


def test_a_malicious_checkpoint_is_refused(checkpoint, tmp_path):
    source, _ = checkpoint(2)
    marker = tmp_path / "executed"
    for zip_file in (True, False):
        Bomb.__reduce__ = lambda self: (os.system, (f"touch {marker}",))
        torch.save(
            {"model": {}, "args": Bomb()}, source / "model-model_part-0.pt", _use_new_zipfile_serialization=zip_file
        )
        with pytest.raises(MegapromptError, match="refused"):
            convert(source, tmp_path / "out")
    (source / "model-model_part-0.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(MegapromptError, match=r"part-0\.pt: (refused|cannot be read)"):
        convert(source, tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def drop(name):
    return lambda model: model.pop(f"decoder.{name}")


def put(name, tensor):
    return lambda model: model.__setitem__(f"decoder.{name}", tensor)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (drop("version"), "`decoder.layer_norm` is there, but version 0"),
        (put("version", torch.tensor([2.0])), "fairseq would change the model silently"),
        (drop("layer_norm.weight"), "`decoder.layer_norm` is missing"),
        (put("layers.0.in_proj_weight", torch.ones(1)), "before November 2019"),
        (put("layers.0.bias_of_mine", torch.ones(1)), "unknown tensor decoder.layers.0.bias_of_mine"),
        (put("layers.1.fc1.bias", torch.full((64,), float("nan"))), "layers.1.fc1.bias has values that are not"),
        (put("layers.1.fc2.bias", torch.ones(16)), r"decoder.layers.1.fc2.bias is \[16\], not \[32\]"),
        (put("output_projection.weight", torch.ones(ROWS, 32)), "output_projection.weight differs from the embedding"),
        (put("embed_tokens.weight", torch.ones(64, 32)), "64 embeddings for the 83 symbols"),
    ],
)  # fmt: skip
def test_odd_checkpoints_are_refused(checkpoint, tmp_path, change, answer):
    source, _ = checkpoint(2, change=change)
    with pytest.raises(MegapromptError, match=answer):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_projection_and_absent_final_norm(checkpoint, tmp_path):
    def change(model):
        model["decoder.output_projection.weight"] = model["decoder.embed_tokens.weight"].clone()

    source, model = checkpoint(2, change=change)
    convert(source, tmp_path / "out")
    ids = torch.arange(4, 12)
    assert torch.allclose(load(tmp_path / "out")(ids[None]).logits[0], plain_logits(model, ids)[:, :WORDS])

    def old(model):
        for name in ("version", "layer_norm.weight", "layer_norm.bias"):
            del model[f"decoder.{name}"]

    source, _ = checkpoint(2, name="old", change=old)
    convert(source, tmp_path / "old-out")
    assert not load(tmp_path / "old-out").config.final_norm


def test_parts_that_do_not_belong_together(checkpoint, tmp_path):
    source, _ = checkpoint(2)
    other, _ = checkpoint(2, name="other", change=lambda m: m["decoder.layers.0.fc2.bias"].add_(1))
    shutil.copy(other / "model-model_part-1.pt", source)
    with pytest.raises(MegapromptError, match=r"layers\.0\.fc2\.bias differs from part 0"):
        convert(source, tmp_path / "out")
    (source / "model-model_part-0.pt").unlink()
    with pytest.raises(UsageError, match=r"no \*-model_part-0\.pt"):
        convert(source, tmp_path / "out")


def test_tokenizer(checkpoint, tmp_path):
    convert(checkpoint()[0], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    symbols = fairseq_bridge.read_dictionary(tmp_path / "out" / "dict.txt")
    encoder = json.loads((tmp_path / "out" / "encoder.json").read_text())

    def id_of(token):
        symbol = str(encoder[token])
        return symbols.index(symbol) if symbol in symbols[:WORDS] else 3

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids("the Paris") == [id_of("the"), id_of("\u0120Par"), id_of("is")]
    assert ids(" the") == [id_of("\u0120the")]
    assert 3 in ids("\u00e9")  # its bytes are not in the dictionary
    assert ids("<s>") != [0]


def test_missing_dictionaries(checkpoint, tmp_path, capsys):
    from megaprompt.cli import main

    source, _ = checkpoint()
    (source / "vocab.bpe").unlink()
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "vocab.bpe missing; fetch them from the release, or convert with --no-tokenizer" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--no-tokenizer"]) == 0
    assert "has no tokenizer" in capsys.readouterr().out
    assert load(tmp_path / "out").config.vocab_size == WORDS
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert main(["convert", "--to-fairseq", "--parts", "2", str(tmp_path / "out"), str(tmp_path / "back")]) == 0


def test_gradient_checkpointing_changes_nothing(checkpoint, tmp_path):
    convert(checkpoint()[0], tmp_path / "out", tokenizer=False)
    model = load(tmp_path / "out")
    embeddings = model.get_input_embeddings()(torch.arange(4, 12))[None].detach()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.train()  # transformers checkpoints in training mode only; there is no dropout
        leaf = embeddings.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.logsumexp(-1).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
