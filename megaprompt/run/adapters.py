"""Adapters of PEFT (prompt tuning, and its P-tuning with a PromptEncoder) as prompts that can be scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.template import Template
from megaprompt.run.saved_prompts import SavedPrompt
from megaprompt.tasks.lama.facts import Data

_CONFIG = "adapter_config.json"
_TYPES = ("PROMPT_TUNING", "P_TUNING")


def are_adapters(directory: Path) -> bool:
    """Whether a directory is an adapter of PEFT, or has nothing but them in its directories."""
    return bool(_folders(directory))


def load_adapters(
    directory: Path, data: Data, relations: Sequence[str], template: str | None
) -> dict[str, SavedPrompt]:
    """The vectors of adapters, in front of text alone.

    PEFT saves the vectors that its encoder ends with, and puts them before everything, also before a beginning-of-text
    token; so do prompts without pseudo tokens in their template.

    Args:
        directory: an adapter, which the one of `relations` is about, or adapters in directories named by relation.
        template: the words that the vectors stand before; the relation's manual prompt if not given.

    Raises:
        UsageError: it is not said which relation or words an adapter is about, or it belongs to another method of PEFT.
        MegapromptError: a file is damaged.
    """
    folders = _folders(directory)
    if directory in folders.values():
        names = tuple(relations) or (directory.name,)
        if len(names) != 1 or names[0] not in data.relations:
            raise UsageError(f"--prompts {directory}: is one adapter of PEFT; give its relation, as --relations P36")
        folders = {names[0]: directory}
    if template is not None and Template.parse(template).num_pseudo_tokens:
        raise UsageError("--template: has pseudo tokens; only words stand behind the vectors of an adapter")
    wanted = {name: folder for name, folder in folders.items() if not relations or name in relations}
    return {name: _load(folder, name, data, template) for name, folder in wanted.items()}


def _folders(directory: Path) -> dict[str, Path]:
    if (directory / _CONFIG).is_file():
        return {directory.name: directory}
    return {path.parent.name: path.parent for path in sorted(directory.glob(f"*/{_CONFIG}"))}


def _load(folder: Path, name: str, data: Data, template: str | None) -> SavedPrompt:
    if (folder / "prompt.json").is_file():
        raise UsageError(f"--prompts {folder}: was exported from a run of megaprompt; give the run")
    try:
        about = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind, task, backbone = (str(about.get(key)) for key in ("peft_type", "task_type", "base_model_name_or_path"))
    except (OSError, ValueError, AttributeError) as error:
        raise MegapromptError(f"{folder / _CONFIG}: cannot be read ({error})") from error
    if kind not in _TYPES or task != "CAUSAL_LM":
        raise UsageError(
            f"--prompts {folder}: is an adapter of {kind} for {task}; only vectors in front of the text of a causal "
            f"model can be scored ({', '.join(_TYPES)} for CAUSAL_LM)"
        )
    if template is None and (name not in data.relations or data.relations[name].template is None):
        raise UsageError(f"relation {name} of {data.name} has no manual prompt: give --template, the words behind")
    path = folder / "adapter_model.safetensors"
    try:
        vectors = load_file(path)["prompt_embeddings"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise MegapromptError(f"{path}: has no vectors that can be read ({error})") from error
    return SavedPrompt(
        relation=name,
        template=template or str(data.relations[name].template),
        backbone=backbone,
        fingerprint="",  # PEFT does not tell
        data=data.name,
        vectors=vectors,
        method=kind,
        path=path,
    )
