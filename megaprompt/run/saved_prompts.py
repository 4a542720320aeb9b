"""Learned prompts in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.engine.learner import Prompt
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file


@dataclass(frozen=True)
class SavedPrompt:
    """A learned prompt as it stands in a file; the encoder that made it is not needed (paper, section 3.2)."""

    relation: str
    template: str
    backbone: str
    fingerprint: str  # of the backbone's weights
    data: str  # that it was learned with
    vectors: Tensor  # [pseudo tokens, hidden size] float32
    label: str = ""
    dev: Mapping[str, float] = field(default_factory=dict)  # its metrics on dev
    head: Mapping[str, Tensor] = field(default_factory=dict)  # tensors of the head that was trained with it, if any
    path: Path = Path()

    _TEXT = ("relation", "template", "backbone", "fingerprint", "data", "label")

    @classmethod
    def of(cls, backbone: Backbone, kept: Prompt, dev: Mapping[str, float], about: Mapping[str, str]) -> SavedPrompt:
        """What was learned on a backbone, with its metrics on dev; `about` has the relation, template, label, data."""
        names = {"backbone": backbone.name, "fingerprint": backbone.fingerprint, **about}
        return cls(vectors=kept.vectors, head=kept.head, dev=dev, **names)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write the file, and read it back: a prompt that is empty or not finite is not worth having.

        Raises:
            MegapromptError: it cannot be written.
        """
        metadata = {name: getattr(self, name) for name in self._TEXT}
        metadata |= {"format": "megaprompt prompt 2", "dev": json.dumps(dict(self.dev))}
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
        if metadata.get("format") not in ("megaprompt prompt 1", "megaprompt prompt 2"):
            raise MegapromptError(f"{path}: is not a prompt of megaprompt; give a directory that probe wrote")
        if not vectors.numel() or not vectors.isfinite().all():
            raise MegapromptError(f"{path}: the prompt is empty or not finite; learn it again")
        text = {name: metadata[name] for name in cls._TEXT}
        first_format = {"p_at_1": float(metadata.get("dev_p_at_1", "nan"))}
        dev = json.loads(metadata["dev"]) if "dev" in metadata else first_format
        return cls(vectors=vectors, dev=dev, head=head, path=path, **text)


def load_prompts(directory: Path) -> dict[str, SavedPrompt]:
    """The prompts of a run, or of a directory of prompt files, by relation.

    Raises:
        UsageError: there are none.
    """
    below = directory / "prompts"
    paths = sorted((below if below.is_dir() else directory).glob("*.safetensors"))
    if not paths:
        raise UsageError(f"--prompts {directory}: no *.safetensors there; give a run that has learned prompts")
    return {prompt.relation: prompt for prompt in map(SavedPrompt.load, paths)}
