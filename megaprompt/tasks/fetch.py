"""Fetch published facts: download an archive, unpack it safely, and write the layout that `facts.load_data` reads.

    lama               the test facts, templates and labels of LAMA (Petroni et al. 2019)
    autoprompt-trex    train, dev and test as AutoPrompt split them (Shin et al. 2020), in OptiPrompt's archive
    p-tuning-lama      AutoPrompt's facts with the vocabularies of the P-tuning paper, as its authors packed them

Until everything is written and checked it is all in a hidden directory beside the target; then that is renamed, so that
a target that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaprompt.errors import MegapromptError, UsageError, first_line
from megaprompt.files import read_jsonl, write_file
from megaprompt.tasks.download import download, extract
from megaprompt.tasks.lama.facts import SPLITS, Split, fact_files, read_vocabulary

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where published facts are, and where in the archive."""

    url: str
    below: tuple[str, ...]  # the facts are in one of these directories of the archive
    relations_url: str | None = None  # templates and labels, if the archive has no relations.jsonl


SOURCES = {
    # Each address as it stands in the README of the repository.
    # https://github.com/facebookresearch/LAMA
    "lama": Source("https://dl.fbaipublicfiles.com/LAMA/data.zip", ("TREx",)),
    # AutoPrompt's own README links to a Google Drive folder, which cannot be downloaded like a file. The same facts are
    # in the archive of https://github.com/princeton-nlp/OptiPrompt, without templates; those are LAMA's, from the files
    # of the model hub's data set "lama".
    "autoprompt-trex": Source(
        "https://nlp.cs.princeton.edu/projects/optiprompt/data.tar.gz",
        ("autoprompt_data", "fact-retrieval/original"),
        "https://s3.amazonaws.com/datasets.huggingface.co/lama/relations.jsonl",
    ),
    # https://github.com/THUDM/P-tuning, LAMA/README.md
    "p-tuning-lama": Source(
        "https://zenodo.org/record/5578210/files/P-tune_LAMA.tar.gz?download=1", ("fact-retrieval/original",)
    ),
}

CHECKSUMS = {
    # SHA-256, as the model hub's data set "lama" gives them. No others were published.
    "https://dl.fbaipublicfiles.com/LAMA/negated_data.tar.gz": (
        "1a151058e6608e47983ea4c99c50bb69248c1c0763a04a3793b0a0b657aa0b61"
    ),
    "https://s3.amazonaws.com/datasets.huggingface.co/lama/relations.jsonl": (
        "154be499a67d5a681bdeaff3bce578a64064c6ce73e471523c6423071e3e5298"
    ),
}


@dataclass(frozen=True)
class Fetched:
    """What was written."""

    relations: int
    templates: int  # relations with a manual prompt
    facts: dict[Split, int]
    vocabularies: list[Path]  # below the target


def fetch(source: Source, out: Path) -> Fetched:
    """Download, unpack and convert a source into the new directory `out`. Called again, it keeps what is there.

    Raises:
        UsageError: `out` exists, or the address is none.
        MegapromptError: the download failed, or the archive is damaged, dangerous, or not the expected one.
    """
    with work_directory(out) as work:
        unpacked = work / "unpacked"
        archive = download(source.url, work, CHECKSUMS.get(source.url))
        extract(archive, unpacked)
        relations = None
        if source.relations_url is not None and not any(unpacked.rglob("relations.jsonl")):
            relations = download(source.relations_url, work, CHECKSUMS.get(source.relations_url))
        fetched = _convert(_root(unpacked, source, archive), relations, work / "whole")
        with archive.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        about = {"url": source.url, "sha256": sha256, "bytes": archive.stat().st_size}
        write_file(work / "whole" / "source.json", json.dumps(about, indent=1).encode() + b"\n")
    return fetched


def fetch_from_hub(name: str, out: Path) -> Fetched:
    """Write LAMA's T-REx facts as the model hub has them (data set `facebook/lama`, with a row for each sentence that
    states a fact) into the new directory `out`.

    Raises:
        UsageError: `out` exists.
        MegapromptError: the hub does not have it, or it is another data set.
    """
    from datasets import load_dataset

    wanted = ("uuid", "sub_uri", "sub_label", "obj_uri", "obj_label")
    about = ("template", "label", "type")
    with work_directory(out) as work:
        try:
            # The data set itself is a program, which the package no longer runs; this is what the hub made of it.
            rows = load_dataset(name, "trex", split="train", revision="refs/convert/parquet")
            rows = rows.select_columns(["predicate_id", *wanted, *about])
        except Exception as error:  # of many kinds, from several packages
            raise MegapromptError(
                f"--hub {name}: {first_line(error)}; leave --hub out for the archive of LAMA's authors"
            ) from error
        facts: dict[str, dict[str, str]] = {}
        relations: dict[str, str] = {}
        for row in rows:
            relation, fact = row["predicate_id"], row["uuid"]
            if relation not in relations:
                relations[relation] = json.dumps({"relation": relation, **{key: row[key] for key in about}})
                facts[relation] = {}
            if fact not in facts[relation]:  # else it is another sentence that states it
                facts[relation][fact] = json.dumps({key: row[key] for key in wanted}, ensure_ascii=False)
        for relation, lines in facts.items():
            write_file(work / "unpacked" / "TREx" / f"{relation}.jsonl", "\n".join(lines.values()).encode())
        write_file(work / "unpacked" / "relations.jsonl", "\n".join(relations.values()).encode())
        fetched = _convert(work / "unpacked", None, work / "whole")
        write_file(work / "whole" / "source.json", json.dumps({"hub": name}, indent=1).encode() + b"\n")
    return fetched


@contextmanager
def work_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out`, whose part `whole` becomes `out` when everything went well.

    Raises:
        UsageError: `out` exists.
        MegapromptError: it cannot be written.
    """
    if out.exists():
        raise UsageError(f"--out {out} exists; choose another directory, or remove it to fetch the data again")
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        for leftover in ("unpacked", "whole"):
            shutil.rmtree(work / leftover, ignore_errors=True)
        yield work
        (work / "whole").rename(out)
    except OSError as error:
        raise MegapromptError(f"cannot write {work} ({error.strerror}); free space or change --out") from error
    shutil.rmtree(work, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- converting


def _root(unpacked: Path, source: Source, archive: Path) -> Path:
    """The directory of the archive that holds the facts' directory and what belongs to it.

    Raises:
        MegapromptError: there is none.
    """
    directories = [unpacked, *sorted(path for path in unpacked.rglob("*") if path.is_dir())]
    for root in sorted(directories, key=lambda path: len(path.parts)):
        if any((root / below).is_dir() for below in source.below):
            return root
    archive.unlink()
    raise MegapromptError(
        f"{source.url}: the archive has no directory {' or '.join(source.below)} and was deleted; it is another data "
        "set, give the right address with --url"
    )


def _convert(root: Path, relations: Path | None, target: Path) -> Fetched:
    """Write what is in a release directory in the layout of `facts.load_data`.

    Raises:
        MegapromptError: a file is malformed; the message names file and line.
    """
    counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    files = fact_files(root)
    for name, splits in files.items():
        for split, path in splits.items():
            lines = []
            for _, row in read_jsonl(path, required=("sub_label", "obj_label")):
                row.pop("evidences", None)  # sentences of Wikipedia: nine tenths of LAMA, and nobody reads them here
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            counts[split] += len(lines)
            write_file(target / "trex" / split / f"{name}.jsonl", "".join(lines).encode())
    about: dict[str, dict[str, Any]] = {}
    described = root / "relations.jsonl" if (root / "relations.jsonl").is_file() else relations
    if described is not None:
        for line, row in read_jsonl(described, required=("relation",)):
            if row["relation"] in about:
                logger.warning("%s:%d: %s is described twice; the first counts", described.name, line, row["relation"])
            elif row["relation"] in files:
                about[row["relation"]] = row
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in about.values())
        write_file(target / "relations.jsonl", text.encode())
    vocabularies = []
    for path in sorted(root.glob("[!.]*-vocab.json")):
        words = Path("vocab") / f"{path.name.removesuffix('-vocab.json')}.txt"
        write_file(target / words, "".join(f"{word}\n" for word in read_vocabulary(path)).encode())
        vocabularies.append(words)
    return Fetched(len(files), sum("template" in row for row in about.values()), counts, vocabularies)
