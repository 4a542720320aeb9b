"""Facts: relations, subjects and objects; the directory layouts of the LAMA family; vocabularies.

A relation (Wikidata's P36, capital) has facts, each a subject and an object (Denmark, Copenhagen), in the splits
train, dev and test, and usually a manual prompt written by a person ("The capital of [X] is [Y] .").
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import read_jsonl
from megaprompt.tasks.task import SPLITS, Split


class Fact(NamedTuple):
    """One fact of a relation, by the names that a text would use."""

    subject: str
    object: str


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Relation:
    """A relation and its facts by split.

    Args:
        template: the manual prompt; None if the data has none.
        wordings: more manual prompts.
        answers: what is to choose from in test, if the data says so.
    """

    id: str
    label: str
    type: str  # 1-1, N-1 or N-M; empty if unknown
    template: str | None
    facts: dict[Split, list[Fact]] = field(repr=False)
    wordings: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """A data set: relations by id, in a fixed order, and the vocabulary file that came with it, if any.

    Args:
        files: that it was read from, but for the vocabulary.
    """

    name: str
    relations: dict[str, Relation]
    vocabulary: Path | None = None
    files: tuple[Path, ...] = field(default=(), repr=False)
    whole_answers: bool = False  # whether it is made for answers of any length, as BEAR is

    @property
    def objects(self) -> list[str]:
        """The words that are objects of any fact, sorted."""
        facts = (fact for relation in self.relations.values() for split in SPLITS for fact in relation.facts[split])
        return sorted({fact.object for fact in facts})

    def select(self, names: Sequence[str]) -> list[Relation]:
        """The relations that are asked for; all if no names.

        Raises:
            UsageError: there is no such relation.
        """
        for name in names:
            if name not in self.relations:
                raise UsageError(f"--relations {name}: not in {self.name}, which has {', '.join(self.relations)}")
        return [self.relations[name] for name in names or self.relations]


def load_data(spec: str) -> Data:
    """`world`, the packaged data, or a directory in BEAR's layout (`tasks.lama.bear`) or in one of the LAMA family's.

    Read are, with `relations.jsonl` (relation, template, label, type, and more wordings in a list, templates) in the
    directory where there is one:

    - `trex/{train,dev,test}/P36.jsonl`
    - `TREx/P36.jsonl`, LAMA's release: test facts only
    - `P36/{train,dev,test}.jsonl`, also below `original/` or `fact-retrieval/original/`: AutoPrompt's and P-tuning's,
      or below `autoprompt_data/`: AutoPrompt's, as OptiPrompt packed it

    Raises:
        UsageError: there is no such data.
        MegapromptError: a file is malformed; the message names file and line.
    """
    if spec == "world":
        from megaprompt.tasks.lama.world import world  # which imports this module

        return world()
    from megaprompt.tasks.lama.bear import bear, is_bear  # likewise

    root = Path(spec)
    if not root.is_dir():
        raise UsageError(
            f"--data {spec}: there is no such directory; give world or a directory in the layout of LAMA or BEAR"
        )
    if is_bear(root):
        return bear(root)
    files = fact_files(root)
    if not files:
        raise UsageError(
            f"--data {spec}: no facts found; expected trex/train/P36.jsonl, TREx/P36.jsonl or P36/train.jsonl below it"
        )
    about = _descriptions(root / "relations.jsonl")
    relations = {}
    for relation in sorted(files, key=lambda r: (len(r), r)):
        row = about.get(relation, {})
        facts: dict[Split, list[Fact]] = {split: [] for split in SPLITS}
        for split, path in files[relation].items():
            rows = read_jsonl(path, required=("sub_label", "obj_label"))
            facts[split] = [Fact(row["sub_label"], row["obj_label"]) for _, row in rows]
        template, *others = [*filter(None, [row.get("template")]), *row.get("templates", ())] or [None]
        wordings = tuple(dict.fromkeys(text for text in others if text != template))
        label, type_ = row.get("label") or relation, row.get("type") or ""
        relations[relation] = Relation(relation, label, type_, template, facts, wordings)
    vocabularies = sorted(root.glob("vocab/*.txt"))
    if len(vocabularies) > 1:
        names = ", ".join(path.name for path in vocabularies)
        logger.warning("%s has several vocabularies (%s), of which none is used; choose one with --vocab", root, names)
    read = [*root.glob("relations.jsonl"), *sorted(path for splits in files.values() for path in splits.values())]
    return Data(root.resolve().name, relations, vocabularies[0] if len(vocabularies) == 1 else None, tuple(read))


def _descriptions(path: Path) -> dict[str, dict[str, Any]]:
    """What `relations.jsonl` says, by relation; nothing if there is no such file."""
    about: dict[str, dict[str, Any]] = {}
    for line, row in read_jsonl(path, required=("relation",)) if path.is_file() else ():
        if row["relation"] in about:
            raise MegapromptError(f"{path}:{line}: relation {row['relation']} is described twice; keep one line")
        for key in ("template", "label", "type"):
            if not isinstance(row.get(key) or "", str):
                raise MegapromptError(f'{path}:{line}: "{key}" is not a text; mend the line')
        texts = row.get("templates", [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise MegapromptError(f'{path}:{line}: "templates" is not a list of texts; mend the line')
        about[row["relation"]] = row
    return about


def fact_files(root: Path) -> dict[str, dict[Split, Path]]:
    """The fact files of every relation below `root`, in the first layout that is there."""
    files: dict[str, dict[Split, Path]] = {}
    # A hidden file is no relation: archives packed on a Mac have a ._P36.jsonl beside P36.jsonl.
    for split in SPLITS:
        for path in root.glob(f"trex/{split}/[!.]*.jsonl"):
            files.setdefault(path.stem, {})[split] = path
    for path in () if files else root.glob("TREx/[!.]*.jsonl"):
        files[path.stem] = {"test": path}
    for below in () if files else (".", "original", "fact-retrieval/original", "autoprompt_data"):
        for split in SPLITS:
            for path in root.glob(f"{below}/[!.]*/{split}.jsonl"):
                files.setdefault(path.parent.name, {})[split] = path
    return files


def read_vocabulary(path: Path) -> list[str]:
    """The words of a vocabulary file: one a line, or P-tuning's `29k-vocab.json`.

    The latter has the tokens of each model by the model's name; BERT's (the first model's, if there is none) are words
    as they are, others start with what stands for a space.

    Raises:
        UsageError: it cannot be read, or has no words.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            by_model = json.loads(text)
            tokens = by_model.get("bert-base-cased") or next(iter(by_model.values()))
            lines = [token.removeprefix("Ġ").removeprefix("▁") for token in tokens if not token.startswith("##")]
        else:
            lines = text.splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--vocab {path}: cannot be read as UTF-8 text, one word a line ({error})") from error
    except (ValueError, AttributeError, TypeError, StopIteration) as error:
        raise UsageError(f"--vocab {path}: has no tokens by model, as P-tuning's 29k-vocab.json; give words") from error
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise UsageError(f"--vocab {path}: the file has no words; one word a line is expected")
    return words
