"""Prompts for others: as a small directory that transformers alone can ask, or as an adapter of PEFT."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.load import files_of
from megaprompt.config import ExportConfig
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file
from megaprompt.prompting.template import Template
from megaprompt.run import standalone
from megaprompt.run.ask import allowed_answers, answers_of, backbone_for, must_be_of_facts
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts

logger = logging.getLogger(__name__)

Piece = dict[str, Any]
"""`tokens` (ids, with `answer` where they are the mask), `vectors` (how many), or `text` with [X] and `is_start`."""

_SUBJECT = "[X]"


def export(config: ExportConfig) -> dict[str, Path]:
    """Write prompts into directories of their own; returns these by relation.

    Raises:
        UsageError: there are no such prompts, or PEFT cannot hold them.
        MegapromptError: a prompt belongs to another backbone.
    """
    prompts = load_prompts(config.prompts, config.method)
    for name in config.relations:
        if name not in prompts:
            raise UsageError(f"--relations {name}: no prompt in {config.prompts}, which has {', '.join(prompts)}")
    chosen = [prompts[name] for name in config.relations or prompts]
    must_be_of_facts(chosen)
    backbone = backbone_for(chosen, config.backbone, None)
    if config.out.exists() and any(config.out.iterdir()):
        raise UsageError(f"--out {config.out}: is not empty; choose another directory")
    if config.to == "transformers" and (whole := _of_whole_answers(config, chosen)):
        raise UsageError(
            f"--to transformers: the prompt of {whole[0].relation} ranks whole answers, which the script cannot; use "
            "megaprompt ask, or --to peft"
        )
    pieces = {prompt.relation: pieces_of(prompt, backbone) for prompt in chosen}
    if config.to == "peft":
        for prompt in chosen:  # nothing is written if one of them cannot be
            _front(prompt, pieces[prompt.relation])
    for prompt in chosen:
        folder, of = config.out / prompt.relation, pieces[prompt.relation]
        if config.to == "peft":
            _for_peft(folder, prompt, of, backbone)
        else:
            _for_transformers(folder, prompt, of, backbone, allowed_answers(config.prompts, "auto", prompt, backbone))
    return {prompt.relation: config.out / prompt.relation for prompt in chosen}


def _of_whole_answers(config: ExportConfig, prompts: Sequence[SavedPrompt]) -> list[SavedPrompt]:
    """One prompt of each data that is asked for whole answers; data are read once."""
    each = {prompt.data: prompt for prompt in reversed(prompts)}
    return [prompt for prompt in each.values() if answers_of(config.prompts, prompt) == "candidates"]


def pieces_of(prompt: SavedPrompt, backbone: Backbone) -> list[Piece]:
    """What a question consists of, in its order.

    Raises:
        MegapromptError: the subject continues a word, which only megaprompt's own tokenization can write.
    """
    encoder, texts, first = backbone.text_encoder(), list[tuple[str, bool]](), backbone.vocabulary_size

    def noted(text: str, is_start: bool) -> list[int]:
        texts.append((text, is_start))
        return [first + len(texts) - 1]  # no token has this number

    template = Template.parse(prompt.template)
    query = template.render({"X": _SUBJECT}, encoder._replace(encode=noted, words=None), before=prompt.before)
    pieces: list[Piece] = []
    for position, token in enumerate(query.tokens):
        if token < 0:
            if pieces and "vectors" in pieces[-1]:
                pieces[-1]["vectors"] += 1
            else:
                pieces.append({"vectors": 1})
        elif token < first or token == encoder.mask:
            is_answer = query.bidirectional and position in query.targets
            pieces.append({"tokens": [token], **({"answer": True} if is_answer else {})})
        else:
            text, is_start = texts[token - first]
            if _SUBJECT not in text:
                pieces.append({"tokens": encoder.encode(text, is_start)})
            elif is_start or text[:1].isspace():
                pieces.append({"text": text, "is_start": is_start})
            else:
                raise MegapromptError(f"{prompt.path}: {text!r} goes on with a word; put a space before it")
    return pieces


def _for_transformers(
    folder: Path, prompt: SavedPrompt, pieces: Sequence[Piece], backbone: Backbone, allowed: Tensor
) -> None:
    tensors = {"vectors": prompt.vectors}
    if not allowed.all():
        tensors["answers"] = allowed.nonzero()[:, 0]
    _write(folder, prompt, pieces, backbone)
    write_file(folder / "prompt.safetensors", save_safetensors({n: t.contiguous() for n, t in tensors.items()}))
    shutil.copyfile(standalone.__file__, folder / "ask.py")


def _for_peft(folder: Path, prompt: SavedPrompt, pieces: Sequence[Piece], backbone: Backbone) -> None:
    try:
        from peft import PromptTuningConfig
    except ImportError as error:
        raise UsageError(f"--to peft: {error}; pip install peft") from error
    if not backbone.causal:
        raise UsageError("--to peft: is for causal models; use --to transformers")
    front, behind = _front(prompt, pieces)
    vectors = _vectors(front, prompt.vectors, backbone)
    config = backbone.model.config.get_text_config()
    about = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(vectors),
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        base_model_name_or_path=_from_anywhere(backbone),
        inference_mode=True,
    )
    _write(folder, prompt, behind, backbone)
    about.save_pretrained(str(folder))
    write_file(folder / "adapter_model.safetensors", save_safetensors({"prompt_embeddings": vectors.contiguous()}))


def _front(prompt: SavedPrompt, pieces: Sequence[Piece]) -> tuple[Sequence[Piece], Sequence[Piece]]:
    """What stands before the subject, which PEFT puts before every input, and the rest.

    Raises:
        UsageError: there are pseudo tokens behind the subject, or nothing is before it.
    """
    subject = next(i for i, piece in enumerate(pieces) if "text" in piece)
    front, behind = pieces[:subject], pieces[subject:]
    if not front or any("vectors" in piece for piece in behind):
        why = "has pseudo tokens behind [X]" if front else "has nothing before [X]"
        raise UsageError(
            f"--to peft: {prompt.relation}'s template {prompt.template!r} {why}, and prompt tuning puts vectors in "
            "front only; use --to transformers, or learn with a --template such as '<6>[X] [Y]'"
        )
    return front, behind


def _vectors(front: Sequence[Piece], learned: Tensor, backbone: Backbone) -> Tensor:
    """[virtual tokens, hidden size]: learned vectors, and embeddings of constant text between."""
    parts, used = [], 0
    for piece in front:
        count = piece.get("vectors", 0)
        parts.append(learned[used : used + count] if count else backbone.embeddings(piece["tokens"]))
        used += count
    return torch.cat(parts).float()


def _from_anywhere(backbone: Backbone) -> str:
    """The name of a model, or the whole path of its directory."""
    found = files_of(backbone.name)
    return str(Path(found).absolute()) if Path(found).is_dir() else found


def _write(folder: Path, prompt: SavedPrompt, pieces: Sequence[Piece], backbone: Backbone) -> None:
    about = {
        "relation": prompt.relation,
        "label": prompt.label,
        "method": prompt.method,
        "template": prompt.template,
        "before": prompt.before,
        "backbone": _from_anywhere(backbone),
        "fingerprint": prompt.fingerprint,
        "masked": not backbone.causal,
        "pieces": list(pieces),
    }
    write_file(folder / "prompt.json", json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n")
