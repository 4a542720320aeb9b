"""Files that are complete or absent, and lines of JSON whose mistakes are named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaprompt.errors import MegapromptError


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens meanwhile.

    Raises:
        MegapromptError: the disk is full or the directory cannot be written.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):  # as below a file
            scratch.unlink(missing_ok=True)
        raise MegapromptError(f"cannot write {path} ({error.strerror or error}); free space or change --out") from error


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jsonl(path: Path, required: Iterable[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank.

    Raises:
        MegapromptError: the file cannot be read, or a line is no JSON object with text under the required keys.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise MegapromptError(f"{path}:{number}: not valid JSON ({error.msg}); mend the line") from error
                if "\\ud" in line.lower() and not _is_text(row):
                    raise MegapromptError(f"{path}:{number}: has half of a character (a lone surrogate); mend the line")
                if not isinstance(row, dict):
                    raise MegapromptError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                for key in required:
                    if not isinstance(row.get(key), str) or not row[key].strip():
                        raise MegapromptError(f'{path}:{number}: "{key}" is missing or not text; mend the line')
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise MegapromptError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _is_text(row: object) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
