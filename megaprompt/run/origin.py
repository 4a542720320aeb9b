"""Where results come from, for results.json: commands, seeds, and what was read, so that others can check and repeat
them."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megaprompt.config import RunConfig
from megaprompt.errors import MegapromptError
from megaprompt.tasks.task import SPLITS, Task


def command_line() -> str:
    """The command of this process, as a shell takes it."""
    return shlex.join(sys.orig_argv)


def seeds(config: RunConfig) -> dict[str, int]:
    """The options that random numbers follow from."""
    return {name: value for name, value in vars(config).items() if name in ("seed", "data_seed")}


def digests(files: Iterable[Path], root: Path) -> dict[str, str]:
    """The SHA-256 of files, as `sha256sum` prints it, by their path: below `root` where they stand there."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            name = path.relative_to(root) if path.is_relative_to(root) else path
            found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def digest_of_examples(task: Task) -> str:
    """The SHA-256 of what is asked: of texts and right answers in all splits, in their order. It does not depend on the
    layout of the files, and tells of the packaged facts too, which have none."""
    asked = {split: [[dict(each.fields), each.answer] for each in task.examples[split]] for split in SPLITS}
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def check_same_examples(before: Mapping[str, Any], tasks: Mapping[str, Task], run: Path) -> None:
    """See that a run that goes on asks what it asked before: averages would be over other facts.

    Args:
        before: `relations` of `data` in results.json.

    Raises:
        MegapromptError: names a relation or task that is new, gone, or has changed.
    """
    known = {name: about["sha256"] for name, about in before.items() if "sha256" in about}
    now = {name: digest_of_examples(task) for name, task in tasks.items()} if known else {}
    if changed := [name for name in known | now if known.get(name) != now.get(name)]:
        raise MegapromptError(
            f"--resume: {', '.join(changed)}: not what was asked when {run} was started; restore the data, or start a "
            "new run"
        )


def check_same_files(before: Mapping[str, Any], files: Mapping[str, str], run: Path) -> None:
    """See that a run that goes on reads what it was started with.

    Args:
        before: `data` of results.json.

    Raises:
        MegapromptError: names a file that has changed.
    """
    for name, digest in before.get("files", files).items():
        if files.get(name) != digest:
            raise MegapromptError(
                f"--resume: {name} is not what it was when {run} was started; restore it, or start a new run"
            )
