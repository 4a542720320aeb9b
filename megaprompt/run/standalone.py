"""A prompt that megaprompt learned, asked with transformers alone: `python ask.py SUBJECT [SUBJECT ...]`.

`megaprompt export --to transformers` copies this file beside prompt.json and prompt.safetensors; it needs nothing of
megaprompt. `embedded` gives the vectors [tokens, hidden size] of a whole question, for anything that takes
`inputs_embeds`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer


def token_ids(tokenizer, text, is_start):
    """A text's tokens, at the start or as words that follow others."""
    before = "" if is_start else "a"
    skipped = len(tokenizer(before, add_special_tokens=False)["input_ids"]) if before else 0
    return tokenizer(before + text, add_special_tokens=False)["input_ids"][skipped:]


def embedded(about, vectors, tokenizer, model, subject):
    """The vectors of a question, and the position at which the answer is read."""
    parts, used, answer = [], 0, -1
    for piece in about["pieces"]:
        if "vectors" in piece:
            parts.append(vectors[used : used + piece["vectors"]])
            used += piece["vectors"]
            continue
        ids = piece.get("tokens") or token_ids(tokenizer, piece["text"].replace("[X]", subject), piece["is_start"])
        if piece.get("answer"):
            answer = sum(map(len, parts))
        parts.append(model.get_input_embeddings()(torch.tensor(ids)))
    return torch.cat(parts), answer


@torch.no_grad()
def ask(folder, subjects, top=5):
    """The best answers to each subject, with their probabilities among the allowed ones."""
    about, tensors = json.loads((folder / "prompt.json").read_text()), load_file(folder / "prompt.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(about["backbone"])
    kind = AutoModelForMaskedLM if about["masked"] else AutoModelForCausalLM
    model = kind.from_pretrained(about["backbone"], dtype=torch.float32).eval()
    for subject in subjects:
        vectors, answer = embedded(about, tensors["vectors"], tokenizer, model, subject.strip())
        logits = model(inputs_embeds=vectors[None]).logits[0, answer]
        allowed = tensors.get("answers", torch.arange(len(logits)))
        best = logits[allowed].softmax(0).topk(min(top, len(allowed)))
        words = [str(tokenizer.decode([token])).strip() for token in allowed[best.indices].tolist()]
        yield list(zip(words, best.values.tolist(), strict=True))


if __name__ == "__main__":
    for subject, answers in zip(sys.argv[1:], ask(Path(__file__).parent, sys.argv[1:]), strict=True):
        print(subject, *(f"{answer} {probability:.4f}" for answer, probability in answers), sep="\t")
