"""BEAR (Wiland et al., arXiv 2404.04113): facts with several wordings, and answers of any length to choose from.

Read are `metadata_relations.json`, which has the wordings and the answer space of each relation, and `P36.jsonl` beside
it. A directory that holds BEAR and BEAR-big is read as one data set: BEAR's facts are test, and BEAR-big's about other
subjects are train and dev. Test is balanced, every answer equally often, and most of its answers do not occur in train
at all: what a prompt has learned about frequent answers gains nothing there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaprompt.errors import MegapromptError
from megaprompt.files import read_jsonl
from megaprompt.tasks.lama.facts import Data, Fact, Relation
from megaprompt.tasks.task import Split

logger = logging.getLogger(__name__)

METADATA = "metadata_relations.json"
_TEST, _REST = "BEAR", "BEAR-big"


def is_bear(root: Path) -> bool:
    """Whether a directory has BEAR's layout."""
    return any((folder / METADATA).is_file() for folder in (root, root / _TEST))


def bear(root: Path) -> Data:
    """The relations of one directory, whose facts are all test, or of BEAR and BEAR-big below `root`.

    Relations of the metadata without a file are left out with a warning. Wordings and answer spaces are not judged
    before their relation is asked (`tasks.lama.whole_answers`).

    Raises:
        MegapromptError: a file is malformed; the message names it.
    """
    test = root if (root / METADATA).is_file() else root / _TEST
    relations, files = {}, [test / METADATA]
    for name, about in _metadata(test / METADATA).items():
        if not (test / f"{name}.jsonl").is_file():
            logger.warning("relation %s is left out: %s has no %s.jsonl; fetch the data again", name, test, name)
            continue
        subjects = set()
        files.append(test / f"{name}.jsonl")
        facts: dict[Split, list[Fact]] = {"train": [], "dev": [], "test": []}
        for subject, fact in _facts(test / f"{name}.jsonl"):
            subjects.add(subject)
            facts["test"].append(fact)
        rest = test.parent / _REST / f"{name}.jsonl"
        if test != root and rest.is_file():
            files.append(rest)
            for subject, fact in _facts(rest):
                if subject not in subjects:
                    facts[_split_of(subject)].append(fact)
        first, *others = about["templates"]
        answers = tuple(about.get("answer_space_labels") or ())
        if about.get("answer_space_labels") is not None and not answers:
            raise MegapromptError(f"{test / METADATA}: {name} has an empty answer space; list its answers")
        relations[name] = Relation(name, name, "", first, facts, tuple(others), answers)
    return Data(root.resolve().name, relations, files=tuple(files), whole_answers=True)


def _metadata(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise MegapromptError(f"{path}: cannot be read as JSON ({error}); fetch the data again") from error
    if not isinstance(found, dict):
        raise MegapromptError(f"{path}: expected an object with a relation each, found {type(found).__name__}")
    for name, about in found.items():
        for key, needed in (("templates", True), ("answer_space_labels", False)):
            value = about.get(key) if isinstance(about, dict) else None
            texts = isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
            if (needed or value is not None) and not (texts and (value or not needed)):
                raise MegapromptError(f'{path}: "{key}" of {name} is no list of texts; mend it')
    return found


def _facts(path: Path) -> list[tuple[str, Fact]]:
    """The facts of a file, with what stands for their subjects."""
    found = []
    for line, row in read_jsonl(path, required=("sub_id", "obj_label")):
        if str(row.get("sub_label", "")).strip():
            found.append((row["sub_id"], Fact(str(row["sub_label"]), row["obj_label"])))
        else:  # as of one fact of BEAR-big
            logger.warning("%s:%d: is left out, since its subject has no name", path, line)
    return found


def _split_of(subject: str) -> Split:
    """A fifth of the subjects is dev, always the same ones."""
    return "dev" if hashlib.sha256(subject.encode()).digest()[0] % 5 == 0 else "train"
