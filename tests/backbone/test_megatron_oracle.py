"""The Megatron bridge against fairseq itself, which has an environment of its own (`make fairseq`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import megaprompt.backbone  # noqa: F401 (registers the model)
from megaprompt.backbone.fairseq_bridge import convert, convert_back
from tests.backbone.megatron_parts import random_model, split, write_checkpoint, write_dictionaries

pytestmark = pytest.mark.slow

FAIRSEQ = Path(__file__).parents[2] / ".fairseq"

TEXTS = [
    "Paris is the capital of France.", " the Paris in the is", "the  two   spaces", "\tparse\nlines\n", "it's WE'LL",
    "na\u00efve caf\u00e9 \u00fc\u00df", "\u6771\u4eac is Tokyo \U0001f600", "<s> the </s> <unk>", "12345 6,78.9", "",
]  # fmt: skip

# Builds a model with fairseq, or loads the parts of one (merged by hand) into it; writes what it computes.
SCRIPT = """
import json, sys, torch
from argparse import Namespace
from pathlib import Path
from safetensors.torch import save_file
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import get_encoder
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture

source, out, texts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
options = json.loads(sys.argv[4])
dictionary = Dictionary.load(str(source / "dict.txt"))
dictionary.pad_to_multiple_(64)
args = Namespace(**options, dropout=0.1, attention_dropout=0.1, add_bos_token=False, tokens_per_sample=64)
base_lm_architecture(args)
torch.manual_seed(0)
task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
model = TransformerLanguageModel.build_model(args, task)
with torch.no_grad():
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)  # norms and biases too
args.criterion = "vocab_parallel_cross_entropy"
found = {k: v for k, v in model.state_dict().items()}
torch.save({"args": args, "model": found, "extra_state": {}, "optimizer_history": []}, out / "whole.pt")
bpe = get_encoder(str(source / "encoder.json"), str(source / "vocab.bpe"))
def encode(text):
    symbols = " ".join(map(str, bpe.encode(text)))
    return dictionary.encode_line(symbols, add_if_not_exist=False, append_eos=False).tolist()
encoded = [encode(t) for t in texts]
ids = torch.tensor([5, 7, 9, 4, 30, 12, 12, 8])
result = {"ids": ids}
for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
    m = model.to(dtype).eval()
    if dtype == torch.float64:  # fairseq computes these two in float32 whatever it is given
        for layer in m.decoder.layers:
            layer.activation_fn = torch.nn.functional.gelu
        utils.softmax = lambda x, dim, onnx_trace=False: torch.nn.functional.softmax(x, dim=dim)
    result[f"logits {name}"] = m(ids[None])[0][0].detach().clone()
    seen = {}
    def keep(module, inputs, output):
        seen["x"] = output.detach().requires_grad_()
        return seen["x"]
    hook = m.decoder.embed_tokens.register_forward_hook(keep)
    m(ids[None])[0][0].logsumexp(-1).sum().backward()
    hook.remove()
    result[f"gradient {name}"] = seen["x"].grad[0].clone()
save_file({k: v.contiguous() for k, v in result.items()}, str(out / "oracle.safetensors"))
(out / "encoded.json").write_text(json.dumps({"ids": encoded, "rows": len(dictionary)}))
"""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A directory with dictionaries, fairseq's model (whole.pt), and what fairseq computes with it."""
    if not (FAIRSEQ / "installed").exists():
        pytest.skip("fairseq is not installed; `make fairseq` does it")
    path = tmp_path_factory.mktemp("oracle")
    write_dictionaries(path, words=120)
    options = {
        "decoder_layers": 4, "decoder_embed_dim": 64, "decoder_ffn_embed_dim": 384, "decoder_attention_heads": 8,
        "decoder_normalize_before": True, "decoder_learned_pos": False, "share_decoder_input_output_embed": True,
        "activation_fn": "gelu", "max_target_positions": 64, "no_scale_embedding": False,
    }  # fmt: skip
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(path), json.dumps(TEXTS), json.dumps(options)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{FAIRSEQ / 'source'}:{FAIRSEQ / 'lib'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return path


def parts_of(oracle: Path, path: Path, parts: int) -> Path:
    """fairseq's model, split."""
    path.mkdir()
    saved = torch.load(oracle / "whole.pt", weights_only=False)
    for i, tensors in enumerate(split(saved["model"], parts)):
        name = f"model-model_part-{i}.pt" if parts > 1 else "model.pt"
        torch.save({**saved, "model": tensors}, path / name)
    for name in ("dict.txt", "encoder.json", "vocab.bpe"):
        (path / name).write_bytes((oracle / name).read_bytes())
    return path


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_logits_and_gradients_are_fairseqs(oracle, tmp_path, parts):
    convert(parts_of(oracle, tmp_path / "parts", parts), tmp_path / "out")
    expected = load_file(oracle / "oracle.safetensors")
    for name, bound in (("float32", 1e-5), ("float64", 1e-10)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, name)).eval()
        embeddings = model.get_input_embeddings()(expected["ids"])[None].detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits[0]
        wanted = expected[f"logits {name}"][:, : logits.shape[1]]
        assert (logits - wanted).norm() < bound * wanted.norm()
        # Over fairseq's rows, padding included, which our model has no longer: their share of the gradient is put back.
        rows = torch.load(oracle / "whole.pt", weights_only=False)["model"]["decoder.embed_tokens.weight"]
        hidden = model.model(inputs_embeds=embeddings).last_hidden_state[0]
        (hidden @ rows.to(hidden.dtype).T).logsumexp(-1).sum().backward()
        wanted = expected[f"gradient {name}"]
        assert (embeddings.grad[0] - wanted).norm() < bound * wanted.norm()


def test_texts_are_encoded_as_by_fairseq(oracle, tmp_path):
    convert(parts_of(oracle, tmp_path / "parts", 2), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = json.loads((oracle / "encoded.json").read_text())
    for text, wanted in zip(TEXTS, encoded["ids"], strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, text
    assert any(3 in ids for ids in encoded["ids"])  # unknown symbols are among them


def test_fairseq_loads_what_is_converted_back(oracle, tmp_path):
    convert(parts_of(oracle, tmp_path / "parts", 4), tmp_path / "out")
    convert_back(tmp_path / "out", tmp_path / "back", 1)
    ours = torch.load(tmp_path / "back" / "model.pt", weights_only=False)["model"]
    theirs = torch.load(oracle / "whole.pt", weights_only=False)["model"]
    assert ours.pop("decoder.embed_positions._float_tensor").shape == (1,)  # in the releases, not in fairseq's latest
    assert ours.keys() == theirs.keys() - {"decoder.output_projection.weight"}
    for name, tensor in ours.items():
        rows = len(tensor) if "embed_tokens" not in name else len(tokens(oracle))
        assert torch.equal(tensor[:rows], theirs[name][:rows]), name


def tokens(path: Path) -> list[str]:
    return ["<s>", "<pad>", "</s>", "<unk>", *(path / "dict.txt").read_text().splitlines()]


MEMORY = """
import resource, sys
from pathlib import Path
from megaprompt.backbone.fairseq_bridge import convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
convert(Path(sys.argv[1]), Path(sys.argv[2]))
before = peak()
convert(Path(sys.argv[3]), Path(sys.argv[4]))
part = max(p.stat().st_size for p in Path(sys.argv[3]).glob("*.pt"))
print("grown", (peak() - before) / part)
"""


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "legacy"])
def test_conversion_needs_the_memory_of_one_part(tmp_path, zip_file, monkeypatch):
    """Peak resident memory above what imports and a small conversion take, for 4 parts of 100 MB."""
    from tests.backbone import megatron_parts

    small = write_checkpoint(write_dictionaries(tmp_path / "small"), random_model(96), 2)
    monkeypatch.setattr(megatron_parts, "WIDTH", 1024)
    monkeypatch.setattr(megatron_parts, "FFN", 8192)
    monkeypatch.setattr(megatron_parts, "LAYERS", 5)
    changed = {"decoder_layers": 5, "decoder_embed_dim": 1024, "decoder_ffn_embed_dim": 8192}
    monkeypatch.setattr(megatron_parts, "OPTIONS", megatron_parts.OPTIONS | changed)
    large = write_checkpoint(write_dictionaries(tmp_path / "large"), random_model(96), 4, zip_file=zip_file)
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, (small, tmp_path / "a", large, tmp_path / "b"))],
        capture_output=True, text=True, check=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert float(finished.stdout.split("grown")[1]) < 1.3
