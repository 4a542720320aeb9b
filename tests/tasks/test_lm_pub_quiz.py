"""Whole answers against LM Pub Quiz itself, which has a folder of its own (`make lm-pub-quiz`)."""

import sys
from pathlib import Path

import pytest
import torch

from megaprompt.backbone import load_backbone
from megaprompt.prompting.packing import PassSize
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks
from tests.tasks.bear_data import write_bear
from tests.tasks.test_whole_answers import masked_backbone, scores_of

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".lm-pub-quiz"
SHARED = ROOT.parent / "shared" / "data" / "bear"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PACKAGE / "installed").is_file(), reason="needs `make lm-pub-quiz`"),
]


@pytest.fixture
def evaluator(monkeypatch):
    """`evaluator(backbone, ...)` is LM Pub Quiz's for a causal or a masked model."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(PACKAGE / "lib")])  # behind: only what is not here already
    from lm_pub_quiz import Evaluator

    def make(backbone, **options):
        kind = "CLM" if backbone.causal else "MLM"
        tokenizer = backbone.tokenization.tokenizer
        return Evaluator.from_model(backbone.model, tokenizer=tokenizer, model_type=kind, device="cpu", **options)

    return make


def compare(evaluator, backbone, task, facts: int, size: PassSize, tolerance: float) -> None:
    """Scores of the first facts in all wordings, and which candidate is chosen."""
    conditional = evaluator(backbone, conditional_score=backbone.causal)  # of masked models, the whole sentence
    whole = evaluator(backbone)
    examples = task.examples["test"][:facts]
    for wording in task.wordings:
        found = scores_of(backbone, task, task.template(wording), size, tolerance)[:facts]
        for i, (example, ours) in enumerate(zip(examples, found, strict=True)):
            asked = {"template": wording, "subject": example.fields["X"], "answers": list(example.candidates)}
            theirs = torch.tensor(conditional.evaluate_instance(**asked, reduction="sum", batch_size=32))
            torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=tolerance)
            assert ours.argmax() == theirs.argmax()
            if i == 0 and wording == task.manual:  # what stands before the answer makes no difference
                sentences = torch.tensor(whole.evaluate_instance(**asked, reduction="sum", batch_size=32))
                assert ours.argmax() == sentences.argmax()


@torch.no_grad()
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs BEAR in ../shared/data")
def test_the_packaged_model_on_six_relations(evaluator):
    backbone = load_backbone("smollm2-135m")
    names = ("P1376", "P412", "P20", "P177", "P103", "P87")
    begin = AskFor(begin=True, needs="all")  # as LM Pub Quiz has it
    tasks = lama_tasks(load_data(str(SHARED)), backbone, begin, names=names, splits=("test",), limit=1, seed=0)
    for task in tasks.values():
        compare(evaluator, backbone, task, 1, PassSize(256, 2048), tolerance=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masked_models(evaluator, kind, tmp_path):
    backbone = masked_backbone(kind)
    data = load_data(str(write_bear(tmp_path / "bear")))
    tasks = lama_tasks(data, backbone, AskFor(needs="all"), names=(), splits=("test",), limit=None, seed=0)
    for task in tasks.values():
        compare(evaluator, backbone, task, 2, PassSize(64, 256), tolerance=1e-4)
