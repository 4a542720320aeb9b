"""Data sets that are read in their authors' own layout: SuperGLUE, FewGLUE and BEAR.

    superglue    train and val of seven tasks (Wang et al. 2019), an archive each
    fewglue      32 examples of train, 32 of dev, and val, as the P-tuning paper's authors packed them
    bear         BEAR and BEAR-big (Wiland et al. 2024)

Their files are checked by reading them as a run would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaprompt.errors import MegapromptError
from megaprompt.files import write_file
from megaprompt.tasks.download import download, extract
from megaprompt.tasks.fetch import work_directory
from megaprompt.tasks.lama.bear import bear
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.reading import read_superglue
from megaprompt.tasks.task import SPLITS


@dataclass(frozen=True)
class Release:
    """Where a data set is.

    Args:
        url: of its archive, or of the directory that has its archives.
        archives: their names there; none if `url` is the archive.
        files: what is kept, by the ends of paths in the archives.
        count: reads the directory as a run would; tells what is in it.
        use: the command that reads it.
    """

    url: str
    archives: tuple[str, ...]
    files: tuple[str, ...]
    count: Callable[[Path], str]
    use: str

    def addresses(self) -> list[str]:
        return [f"{self.url.rstrip('/')}/{name}" for name in self.archives] or [self.url]


def _superglue(root: Path) -> str:
    return _counted(root, "full")


def _fewglue(root: Path) -> str:
    return _counted(root, "few-shot")


def _counted(root: Path, setting: Literal["few-shot", "full"]) -> str:
    data = read_superglue(root, setting).values()
    counts = (f"{sum(len(task.examples[split]) for task in data):,} {split}" for split in SPLITS)
    return f"{len(data)} tasks, as --setting {setting} reads them: {', '.join(counts)} examples"


def _bear(root: Path) -> str:
    relations = bear(root).relations.values()
    counts = (f"{sum(len(relation.facts[split]) for relation in relations):,} {split}" for split in SPLITS)
    return f"{len(relations)} relations: {', '.join(counts)} facts"


def _files(*splits: str) -> tuple[str, ...]:
    return tuple(f"{task}/{split}.jsonl" for task in KINDS for split in splits)


RELEASES = {
    # As https://super.gluebenchmark.com/tasks links to them. Labels of test were never published.
    "superglue": Release(
        "https://dl.fbaipublicfiles.com/glue/superglue/data/v2",
        tuple(f"{task}.zip" for task in KINDS),
        _files("train", "val"),
        _superglue,
        "superglue --setting full",
    ),
    # FewGLUE_32dev of https://github.com/THUDM/P-tuning
    "fewglue": Release(
        "https://github.com/THUDM/P-tuning/archive/f4225d4d8003.zip",
        (),
        _files("train", "dev32", "val"),
        _fewglue,
        "superglue --setting few-shot",
    ),
    # https://github.com/lm-pub-quiz/BEAR
    "bear": Release(
        "https://github.com/lm-pub-quiz/BEAR/archive/725b4e3139d0a5fdf914b0419ba744273dddc689.zip",
        (),
        tuple(f"{name}/{file}" for name in ("BEAR", "BEAR-big") for file in ("metadata_relations.json", "P*.jsonl")),
        _bear,
        "probe",
    ),
}


def fetch_release(release: Release, out: Path) -> str:
    """Download and unpack a data set into the new directory `out`; returns what is in it, in words.

    Called again after it was interrupted, it keeps the archives that are there.

    Raises:
        UsageError: `out` exists, or the address is none.
        MegapromptError: a download failed, or an archive is damaged, dangerous, or not the expected one.
    """
    with work_directory(out) as work:
        unpacked, about = work / "unpacked", []
        unpacked.mkdir()
        archives = [download(url, work) for url in release.addresses()]
        for number, (url, archive) in enumerate(zip(release.addresses(), archives, strict=True)):
            with archive.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            about.append({"url": url, "sha256": sha256, "bytes": archive.stat().st_size})
            extract(archive, unpacked / str(number))
        for wanted in release.files:
            found = sorted(unpacked.rglob(wanted), key=lambda path: len(path.parts))
            if not found:
                for archive in archives:
                    archive.unlink()
                raise MegapromptError(
                    f"{release.url}: {wanted} is in no archive from there, and what came was deleted; it is another "
                    "data set, give the right address with --url"
                )
            for path in found:
                if path.parent == found[0].parent:
                    write_file(work / "whole" / Path(wanted).parent / path.name, path.read_bytes())
        counted = release.count(work / "whole")
        write_file(work / "whole" / "source.json", json.dumps(about, indent=1).encode() + b"\n")
    return counted
