"""Prompts that leave: asked with transformers alone, and as adapters of PEFT."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from megaprompt.backbone import load_backbone
from megaprompt.cli import main
from megaprompt.config import AskConfig, EvaluateConfig, ExportConfig, ProbeConfig
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.template import Template
from megaprompt.run import standalone
from megaprompt.run.ask import ask
from megaprompt.run.evaluate import evaluate
from megaprompt.run.export import export
from megaprompt.run.job import probe
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from tests.conftest import plain_logits

WITHOUT_MEGAPROMPT = "import sys, runpy; sys.modules['megaprompt'] = None; sys.argv[:] = sys.argv[1:]; "
WITHOUT_MEGAPROMPT += "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def learn(backbone_directory, data_directory, tmp_path):
    """Learn prompts; returns the run."""

    def learn(template=None, methods=("p-tuning",), **options):
        out = tmp_path / "run"
        common = {"backbone": str(backbone_directory), "data": str(data_directory), "max_steps": 4}
        probe(ProbeConfig(**{**common, **options}, out=out, methods=methods, template=template))
        return out

    return learn


def asked_alone(folder, *subjects):
    """The answers of ask.py, in a process that cannot import megaprompt."""
    command = [sys.executable, "-c", WITHOUT_MEGAPROMPT, folder / "ask.py", *subjects]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {subject: [each.rsplit(" ", 1) for each in answers] for subject, *answers in lines}


SUBJECTS = ["Peru", "South Korea", "Nowhere-on-Sea"]


def assert_as_asked(found, run):
    """The answers are those of `megaprompt ask`."""
    for subject, answers in zip(SUBJECTS, found, strict=True):
        expected = ask(AskConfig(subject, prompts=run, relation="P36"))
        assert [answer for answer, _ in answers] == [answer for answer, _ in expected]
        for (_, probability), (_, true) in zip(answers, expected, strict=True):
            assert float(probability) == pytest.approx(true, abs=1e-4)


@pytest.mark.slow
def test_transformers_alone_gives_the_same_answers(learn, tmp_path):
    run = learn()
    assert main(["export", "--prompts", str(run), "--out", str(tmp_path / "out")]) == 0
    found = asked_alone(tmp_path / "out" / "P36", *SUBJECTS)
    assert_as_asked([found[subject] for subject in SUBJECTS], run)


@pytest.mark.parametrize("template", ["<2>capital of [X] is <1>[Y]", "Where: [X] <2> [Y]", "[X]<2>[Y]"])
def test_any_template(learn, tmp_path, template):
    run = learn(template)
    folder = export(ExportConfig(prompts=run, out=tmp_path / "out"))["P36"]
    assert_as_asked(standalone.ask(folder, SUBJECTS), run)


def test_demonstrations_leave_too(learn, tmp_path):
    run = learn(methods=("in-context",))
    folders = export(ExportConfig(prompts=run, out=tmp_path / "out", relations=("P36",)))
    assert set(folders) == {"P36"}
    assert_as_asked(standalone.ask(folders["P36"], SUBJECTS), run)


def test_answers_and_model_are_those_of_the_run(learn, backbone_directory, tmp_path, monkeypatch):
    """From any directory, and among the words that the prompt was learned with."""
    monkeypatch.chdir(backbone_directory.parent)
    (tmp_path / "words.txt").write_text("Lima\nParis\nSeoul\n")
    run = learn(vocab=str(tmp_path / "words.txt"), backbone=backbone_directory.name, relations=("P36",))
    folder = export(ExportConfig(prompts=run, out=tmp_path / "out"))["P36"]
    assert json.loads((folder / "prompt.json").read_text())["backbone"] == str(backbone_directory.absolute())
    assert_as_asked(standalone.ask(folder, SUBJECTS), run)
    assert {answer for answer, _ in next(iter(standalone.ask(folder, ["Peru"])))} == {"Lima", "Paris", "Seoul"}


def test_prompts_of_whole_answers_are_not_exported_as_something_else(learn, tmp_path):
    run = learn(answers="candidates")
    with pytest.raises(UsageError, match="P36 ranks whole answers, which the script cannot"):
        export(ExportConfig(prompts=run, out=tmp_path / "out", relations=("P36",)))


def test_masked_models(learn, tokenizer, tmp_path):
    path = tmp_path / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=len(tokenizer) + 1,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    own = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**own, "mask_token": "<mask>"}))
    run = learn(backbone=str(path))
    folder = export(ExportConfig(prompts=run, out=tmp_path / "out"))["P36"]
    assert any(piece.get("answer") for piece in json.loads((folder / "prompt.json").read_text())["pieces"])
    assert_as_asked(standalone.ask(folder, SUBJECTS), run)
    with pytest.raises(UsageError, match="--to peft"):
        export(ExportConfig(prompts=run, to="peft", out=tmp_path / "peft"))


@pytest.mark.parametrize("template", ["<3>[X] [Y]", "<2> the capital <1> [X] is [Y]"])
def test_an_adapter_of_peft_gives_the_same_logits(learn, backbone_directory, tmp_path, template):
    peft = pytest.importorskip("peft")
    run = learn(template)
    folder = export(ExportConfig(prompts=run, to="peft", out=tmp_path / "out"))["P36"]
    backbone = load_backbone(str(backbone_directory))
    prompt = load_prompts(run)["P36"]
    query = Template.parse(template).render({"X": "South Korea"}, backbone.text_encoder())
    expected = plain_logits(backbone, [query], prompt.vectors)[0]

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone_directory), folder)
    [piece] = json.loads((folder / "prompt.json").read_text())["pieces"]
    ids = backbone.text_encoder().encode(piece["text"].replace("[X]", "South Korea"), piece["is_start"])
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert load_file(folder / "adapter_model.safetensors")["prompt_embeddings"].shape[1] == backbone.hidden_size


def test_what_peft_cannot_hold_is_refused(learn, tmp_path):
    run = learn()
    with pytest.raises(UsageError, match=r"P30's template .* has pseudo tokens behind \[X\].*use --to transformers"):
        export(ExportConfig(prompts=run, to="peft", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no prompt in"):
        export(ExportConfig(prompts=run, out=tmp_path / "out", relations=("P99",)))
    with pytest.raises(UsageError, match="is not empty"):
        export(ExportConfig(prompts=run, out=run))


# ---------------------------------------------------------------------------------------------- adapters of others


def an_adapter(folder, backbone_directory, kind="encoder", task="CAUSAL_LM"):
    """An adapter as PEFT itself makes and saves it; returns PEFT's model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    about = {"task_type": task, "num_virtual_tokens": 3}
    config = peft.LoraConfig(task_type=task, target_modules=["q_proj"])
    if kind == "encoder":
        config = peft.PromptEncoderConfig(**about, encoder_hidden_size=16)
    elif kind == "prompt":
        config = peft.PromptTuningConfig(**about)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(backbone_directory), config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["encoder", "prompt"])
@pytest.mark.parametrize("template", [None, "Where is the capital of [X] ? In [Y]"])
def test_adapters_of_peft_are_scored_as_peft_asks(backbone_directory, data_directory, tmp_path, kind, template):
    model = an_adapter(tmp_path / "P36", backbone_directory, kind)
    found = evaluate(EvaluateConfig(prompts=tmp_path, data=str(data_directory), vocab="none", template=template))

    backbone, data = load_backbone(str(backbone_directory)), load_data(str(data_directory))
    ask_for = AskFor(load_vocabulary("none", data, backbone.tokenization))
    task = lama_tasks(data, backbone, ask_for, names=("P36",), splits=("test",), limit=None, seed=0)["P36"]
    words = (template or task.manual).split("[Y]")[0].strip()
    tokenizer = AutoTokenizer.from_pretrained(backbone_directory)
    ranks = []
    for example in task.examples["test"]:
        ids = tokenizer(words.replace("[X]", example.fields["X"]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        ranks.append(int((logits >= logits[example.gold])[ask_for.vocabulary.allowed].sum()))
    assert found["relations"]["P36"]["facts"] == len(ranks)
    assert found["relations"]["P36"]["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), abs=1e-6)


def test_a_token_for_the_beginning_stands_behind_the_vectors(make_backbone):
    prompt = SavedPrompt("P36", "The capital of [X] is [Y].", "", "", "", torch.zeros(2, 32))
    encoder = make_backbone().text_encoder()._replace(prefix=(7,))
    query = Template.parse(prompt.template).render({"X": "Peru"}, prompt.encoder_of(encoder))
    assert query.tokens == (-1, -2, 7, *encoder.encode("The capital of Peru is", True))


def test_adapters_that_cannot_be_scored(learn, backbone_directory, data_directory, tmp_path):
    data, folder = str(data_directory), tmp_path / "adapter"

    def scored(**options):
        return evaluate(EvaluateConfig(**{"prompts": folder, "data": data, "relations": ("P36",), **options}))

    an_adapter(folder, backbone_directory)
    assert scored()["relations"]["P36"]["facts"]
    with pytest.raises(UsageError, match="give --data"):
        scored(data=None)
    with pytest.raises(UsageError, match="only words stand behind the vectors of an adapter"):
        scored(template="<3>[X] [Y]")
    with pytest.raises(UsageError, match="is one adapter of PEFT; give its relation"):
        scored(relations=())
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(MegapromptError, match=r"adapter_model.safetensors: has no vectors that can be read"):
        scored()
    an_adapter(folder, backbone_directory, "lora")
    with pytest.raises(UsageError, match="is an adapter of LORA for CAUSAL_LM; only vectors in front"):
        scored()
    run = learn("<3>[X] [Y]")
    export(ExportConfig(prompts=run, to="peft", out=tmp_path / "out"))
    with pytest.raises(UsageError, match="was exported from a run of megaprompt; give the run"):
        scored(prompts=tmp_path / "out")
    with pytest.raises(UsageError, match="--template: is for adapters"):
        scored(prompts=run, template="[X] [Y]")
