"""Fetch published facts: download an archive, unpack it safely, and write the layout that `facts.load_data` reads.

    lama               the test facts, templates and labels of LAMA (Petroni et al. 2019)
    autoprompt-trex    train, dev and test as AutoPrompt split them (Shin et al. 2020), in OptiPrompt's archive
    p-tuning-lama      AutoPrompt's facts with the vocabularies of the P-tuning paper, as its authors packed them

A download that was cut off goes on where it stopped. Until everything is written and checked it is all in a hidden
directory beside the target; then that is renamed, so that a target that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import requests
import urllib3

from megaprompt.console import progress
from megaprompt.errors import MegapromptError, UsageError, first_line
from megaprompt.files import read_jsonl, write_file
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

_TRIES = 4  # in a row that bring nothing new
_RETRY_SECONDS = 1.0  # before the second try; twice as long before each further one
_TIMEOUT = (30, 60)  # seconds to connect, and without a byte
_CHUNK = 1 << 18  # bytes
_MAX_UNPACKED = 8 << 30  # bytes; LAMA has less than one tenth of that
_MAX_FILES = 100_000
_WANTED = (".jsonl", ".json", ".txt")
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, LZMAError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Fetched:
    """What was written."""

    relations: int
    templates: int  # relations with a manual prompt
    facts: dict[Split, int]
    vocabularies: list[Path]  # below the target


def fetch(source: Source, out: Path) -> Fetched:
    """Download, unpack and convert a source into the new directory `out`. Called again, it goes on where it stopped.

    Raises:
        UsageError: `out` exists, or the address is none.
        MegapromptError: the download failed, or the archive is damaged, dangerous, or not the expected one.
    """
    with _work_directory(out) as work:
        archive, unpacked = work / "archive", work / "unpacked"
        sha256 = download(source.url, archive)
        extract(archive, unpacked)
        relations = None
        if source.relations_url is not None and not any(unpacked.rglob("relations.jsonl")):
            relations = work / "relations.jsonl"
            download(source.relations_url, relations)
        fetched = _convert(_root(unpacked, source, archive), relations, work / "whole")
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
    with _work_directory(out) as work:
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
def _work_directory(out: Path) -> Iterator[Path]:
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


# --------------------------------------------------------------------------------------------------------- downloading


class _Cut(Exception):
    """The connection ended too early; what has arrived is kept."""


def download(url: str, path: Path) -> str:
    """Download a file, going on with what is there from an earlier call; returns its SHA-256.

    Raises:
        UsageError: this is no address.
        MegapromptError: the server refuses, the connection fails again and again, or the checksum is wrong.
    """
    best, failures = 0, 0
    with requests.Session() as session:
        while True:
            try:
                _continue(session, url, path)
                break
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
                raise UsageError(f"--url {url}: is no http or https address ({error})") from error
            except requests.exceptions.MissingSchema as error:
                raise UsageError(f"--url {url}: is no address; it starts with http:// or https://") from error
            except (requests.RequestException, _Cut) as error:
                size = path.stat().st_size if path.exists() else 0
                failures = 1 if size > best else failures + 1  # a server that cannot resume may fail forever
                best = max(best, size)
                if failures == _TRIES:
                    raise MegapromptError(
                        f"{url}: the download stopped after {size} bytes ({_reason(error)}); the same command goes on"
                    ) from error
                time.sleep(_RETRY_SECONDS * 2 ** (failures - 1))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != CHECKSUMS.get(url, sha256):
        _forget(path)
        raise MegapromptError(
            f"{url}: the file that arrived is not the published one (SHA-256 {sha256}, not {CHECKSUMS[url]}) and was "
            "deleted; try again, or from another address with --url"
        )
    return sha256


def _continue(session: requests.Session, url: str, path: Path) -> None:
    """Ask for what is missing of a file, and append it.

    Raises:
        _Cut, requests.RequestException: less arrived than was announced, or nothing.
        MegapromptError: the server refuses.
    """
    # Which version of which file the part is of: another one must not be glued to it.
    known = _part_of(path)
    if known.get("url") != url:
        _forget(path)
        known = {"url": url}
    have = path.stat().st_size if path.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # ranges count the bytes of what is sent
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.get("version"):
            headers["If-Range"] = known["version"]
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        start, total = _sent_range(response)
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            if total == have:
                return
            _forget(path)
            raise _Cut("the server has another file now")
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _Cut(f"the server says {response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise MegapromptError(
                f"{url}: the server says {response.status_code} {response.reason}; give another address with --url"
            )
        if response.status_code == 206 and start != have:
            _forget(path)
            raise _Cut("the server sent another part than asked for")
        if response.status_code == 200:  # it does not know ranges, or has another version now
            have = 0
        etag = response.headers.get("ETag", "")
        known["version"] = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        write_file(_about(path), json.dumps(known).encode())
        with (
            path.open("ab" if have else "wb") as file,
            progress(f"downloading {url.partition('?')[0].rpartition('/')[2]}", (total or 0) // 1000, unit="kB") as bar,
        ):
            try:
                # requests' own loop waits for whole chunks, and a connection that is cut loses the last one.
                while chunk := response.raw.read1(_CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    bar(have // 1000, (total or have) // 1000)
            except urllib3.exceptions.ReadTimeoutError as error:
                raise _Cut(f"the server was silent for {_TIMEOUT[1]} s") from error
            except urllib3.exceptions.HTTPError as error:
                raise _Cut("the connection was cut") from error
    if total is not None and have != total:
        if have > total:
            _forget(path)
        raise _Cut(f"{have} of {total} bytes arrived")


def _sent_range(response: requests.Response) -> tuple[int, int | None]:
    """Where the answer starts, and the size of the whole file, None if the server does not tell."""
    if found := response.headers.get("Content-Range"):  # "bytes 100-299/300", or "bytes */300"
        sent, _, size = found.removeprefix("bytes").strip().partition("/")
        start = sent.partition("-")[0]
        return int(start) if start.isdecimal() else 0, int(size) if size.isdecimal() else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.json")


def _part_of(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(_about(path).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
    _about(path).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """The innermost cause: requests wraps it three times."""
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(inner, Exception):
        return _reason(inner)
    return str(error).rpartition(": ")[2] or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- unpacking


def extract(archive: Path, target: Path) -> None:
    """Unpack the text files of a zip or tar archive into the new directory `target`.

    Nothing is unpacked from an archive that could write elsewhere or fill the disk. An archive that is refused is
    deleted, so that the next call downloads it again.

    Raises:
        MegapromptError: it is damaged, no archive, or has links, devices, paths out of `target`, or too much in it.
    """
    target.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for info in _checked(_zip_members(file)):
                    file.extract(info, target)
        elif tarfile.is_tarfile(archive):
            # Everything is looked at before anything is written.
            with tarfile.open(archive) as tar:
                wanted = list(_checked(_tar_members(tar)))
            with tarfile.open(archive) as tar:
                for member in wanted:
                    tar.extract(member, target, filter="data")
        else:
            raise _Unfit("is no zip or tar archive (a web page, maybe)")
    except (_Unfit, *_DAMAGED) as error:
        _forget(archive)
        why = str(error) if isinstance(error, _Unfit) else f"is damaged or cut off ({error})"
        raise MegapromptError(
            f"the archive {why} and was deleted; fetch it again, or from another address with --url"
        ) from error


class _Unfit(Exception):
    """Why an archive is refused."""


class _Member(NamedTuple):
    name: str
    size: int
    is_file: bool
    is_directory: bool
    info: Any  # what the library calls a member


def _zip_members(file: zipfile.ZipFile) -> Iterator[_Member]:
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if it was not packed on Unix
        yield _Member(info.filename, info.file_size, kind in (0, stat.S_IFREG), info.is_dir(), info)


def _tar_members(tar: tarfile.TarFile) -> Iterator[_Member]:
    for info in tar:
        yield _Member(info.name, info.size, info.isreg(), info.isdir(), info)


def _checked(members: Iterator[_Member]) -> list[Any]:
    """The text files among the members, if none of all is dangerous.

    Raises:
        _Unfit: one is.
    """
    wanted, size = [], 0
    for count, member in enumerate(members, 1):
        path = PurePosixPath(member.name.replace("\\", "/"))
        if path.is_absolute() or PureWindowsPath(member.name).drive or ".." in path.parts:
            raise _Unfit(f"has a path that leads out of it ({member.name!r})")
        if not (member.is_file or member.is_directory):
            raise _Unfit(f"has a link or device in it ({member.name!r})")
        size += member.size
        if size > _MAX_UNPACKED or count > _MAX_FILES:
            raise _Unfit(f"would take more than {_MAX_UNPACKED / 1e9:.1f} GB or {_MAX_FILES} files")
        if not member.is_directory and path.suffix in _WANTED:
            wanted.append(member.info)
    return wanted


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
    _forget(archive)
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
