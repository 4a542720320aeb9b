"""Prompts in files: what was learned, or chosen, for each relation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.engine.learner import Prompt
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file
from megaprompt.prompting.query import TextEncoder
from megaprompt.prompting.template import Template


@dataclass(frozen=True)
class SavedPrompt:
    """A prompt as it stands in a file; the encoder that made its vectors is not needed (paper, section 3.2)."""

    relation: str
    template: str
    backbone: str
    fingerprint: str  # of the backbone's weights; empty if unknown
    data: str  # that it was learned with
    vectors: Tensor  # [pseudo tokens, hidden size] float32; none of a prompt that is text alone
    label: str = ""
    before: str = ""  # demonstrations, which stand before the question
    method: str = "p-tuning"
    random_weights: str = ""  # the seed of the backbone's weights, if they are random
    dev: Mapping[str, float] = field(default_factory=dict)  # its metrics on dev
    head: Mapping[str, Tensor] = field(default_factory=dict)  # tensors of the head that was trained with it, if any
    path: Path = Path()

    _TEXT = ("relation", "template", "backbone", "fingerprint", "data", "label", "before", "method", "random_weights")

    @classmethod
    def of(
        cls, backbone: Backbone, kept: Prompt | None, dev: Mapping[str, float], about: Mapping[str, str]
    ) -> SavedPrompt:
        """What was learned on a backbone, or text alone, with its metrics on dev; `about` has the relation, template,
        label, data."""
        kept = kept or Prompt(torch.zeros(0, backbone.embedding_size))
        names = {"backbone": backbone.name, "fingerprint": backbone.fingerprint, **about}
        if backbone.random_weights is not None:
            names["random_weights"] = str(backbone.random_weights)
        return cls(vectors=kept.vectors, head=kept.head, dev=dev, **names)  # type: ignore[arg-type]

    def encoder_of(self, backbone: TextEncoder) -> TextEncoder:
        """How the backbone reads text with this prompt: vectors that the template has no place for, as those of PEFT,
        stand in front of it all."""
        in_front = len(self.vectors) - Template.parse(self.template).num_pseudo_tokens
        return backbone._replace(prefix=(*range(-1, -1 - in_front, -1), *backbone.prefix))

    def save(self, path: Path) -> None:
        """Write the file, and read it back: a prompt that is empty or not finite is not worth having.

        Raises:
            MegapromptError: it cannot be written.
        """
        metadata = {name: getattr(self, name) for name in self._TEXT}
        metadata |= {"format": "megaprompt prompt 3", "dev": json.dumps(dict(self.dev))}
        tensors = {"prompts": self.vectors, **{f"head.{name}": value for name, value in self.head.items()}}
        write_file(path, save_safetensors({n: t.float().contiguous().cpu() for n, t in tensors.items()}, metadata))
        SavedPrompt.load(path)

    @classmethod
    def load(cls, path: Path) -> SavedPrompt:
        """Read a prompt.

        Raises:
            MegapromptError: the file is no prompt, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata, vectors = file.metadata() or {}, file.get_tensor("prompts")
                head = {n.removeprefix("head."): file.get_tensor(n) for n in file.keys() if n != "prompts"}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise MegapromptError(f"{path}: cannot be read as a prompt ({error})") from error
        if metadata.get("format") not in _FORMATS:
            raise MegapromptError(f"{path}: is not a prompt of megaprompt; give a directory that probe wrote")
        text = {name: metadata[name] for name in cls._TEXT if name in metadata}
        if not vectors.isfinite().all() or (not vectors.numel() and text.get("method", "p-tuning") == "p-tuning"):
            raise MegapromptError(f"{path}: the prompt is empty or not finite; learn it again")
        first_format = {"p_at_1": float(metadata.get("dev_p_at_1", "nan"))}
        dev = json.loads(metadata["dev"]) if "dev" in metadata else first_format
        return cls(vectors=vectors, dev=dev, head=head, path=path, **text)


_FORMATS = tuple(f"megaprompt prompt {number}" for number in (1, 2, 3))


PREFERRED = ("best", "p-tuning", "in-context", "best-manual", "manual")
"""Methods whose prompts are taken if nobody says which."""


def prompt_file(run: Path, method: str, relation: str) -> Path:
    """Where a run keeps what a method found for a relation."""
    below = run / "prompts"
    return (below if method == "p-tuning" else below / method) / f"{relation}.safetensors"


def methods_with_prompts(directory: Path) -> list[str]:
    """The methods of which a run, or a directory of prompt files, has prompts; those that are preferred first.

    Raises:
        UsageError: there are none.
    """
    found = _files(directory)
    return [name for name in PREFERRED if name in found] + [name for name in found if name not in PREFERRED]


def load_prompts(directory: Path, method: str | None = None) -> dict[str, SavedPrompt]:
    """The prompts of a run, or of a directory of prompt files, by relation.

    Args:
        method: that found them; if not given, the first of PREFERRED and others that a run has.

    Raises:
        UsageError: there are none.
    """
    found = _files(directory)
    name = method or methods_with_prompts(directory)[0]
    if name not in found:
        raise UsageError(f"--method {name}: {directory} has prompts of {', '.join(found)}")
    return {prompt.relation: prompt for prompt in map(SavedPrompt.load, found[name])}


def _files(directory: Path) -> dict[str, list[Path]]:
    """Files of prompts by method."""
    below = directory / "prompts"
    root = below if below.is_dir() else directory
    folders = {"p-tuning": root, **{path.name: path for path in sorted(root.glob("*/"))}}
    found = {name: sorted(path.glob("*.safetensors")) for name, path in folders.items()}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise UsageError(f"--prompts {directory}: no *.safetensors there; give a run that has learned prompts")
    return found
