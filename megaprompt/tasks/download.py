"""Downloads, with pooch, and archives that are unpacked without trusting them.

A download is there whole or not at all. It is not resumed where it broke off, only begun again: what we fetch takes a
minute or two.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pooch
import requests
from pooch.downloaders import HTTPDownloader

from megaprompt.console import Update, progress
from megaprompt.errors import MegapromptError, UsageError

_TRIES = 4
_TIMEOUT = (30, 60)  # seconds to connect, and without a byte
_MAX_UNPACKED = 8 << 30  # bytes; LAMA has less than one tenth of that
_MAX_FILES = 100_000
_WANTED = (".jsonl", ".json", ".txt")
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, LZMAError, NotImplementedError, RuntimeError)

pooch.get_logger().setLevel(logging.WARNING)


# --------------------------------------------------------------------------------------------------------- downloading


def download(url: str, directory: Path, sha256: str | None = None) -> Path:
    """Download a file into a directory, under a name that belongs to its address; if it is there already, leave it.

    Args:
        sha256: the checksum, where one was published.

    Raises:
        UsageError: this is no address.
        MegapromptError: the server refuses, the connection fails again and again, or the checksum is wrong.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {url}: is no address; it starts with http:// or https://")
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    source = pooch.create(directory, "", registry={name: sha256}, urls={name: url}, retry_if_failed=_TRIES - 1)
    with progress(f"downloading {url.partition('?')[0].rpartition('/')[2]}", 0, unit="kB") as update:
        try:
            return Path(source.fetch(name, downloader=_Download(timeout=_TIMEOUT, progressbar=_Bar(update))))
        except requests.RequestException as error:
            raise MegapromptError(
                f"{url}: the download failed {_TRIES} times ({_reason(error)}); try again later, or from "
                f"another address with --url"
            ) from error
        except ValueError as error:  # of pooch
            raise MegapromptError(
                f"{url}: the file that arrived is not the published one (its SHA-256 is not {sha256}) and was deleted; "
                f"try again, or from another address with --url"
            ) from error


class _Download(HTTPDownloader):
    """pooch's download over HTTP, but what the server refuses for good is not asked for again."""

    def __call__(self, url: str, *rest: Any, **more: Any) -> Any:
        try:
            return super().__call__(url, *rest, **more)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise UsageError(f"--url {url}: is no http or https address ({error})") from error
        except requests.HTTPError as error:
            answer = error.response
            if answer is None or answer.status_code in (408, 429) or answer.status_code >= 500:
                raise
            raise MegapromptError(
                f"{url}: the server says {answer.status_code} {answer.reason}; give another address with --url"
            ) from error


class _Bar:
    """What pooch tells about its progress, in kB."""

    total = 0  # bytes; set by pooch when the server has told

    def __init__(self, update: Update) -> None:
        self._update = update
        self._done = 0

    def update(self, size: int) -> None:
        self._done += size
        self._update(self._done // 1000, max(self._done, self.total) // 1000)

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None: ...


def _reason(error: Exception) -> str:
    """The innermost cause: requests wraps it three times."""
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(inner, Exception):
        return _reason(inner)
    return str(error).rpartition(": ")[2] or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- unpacking


class _Unfit(Exception):
    """Why an archive is refused."""


def extract(archive: Path, target: Path) -> None:
    """Unpack the text files of a zip or tar archive into the new directory `target`.

    An archive that is refused is deleted, so that the next call downloads it again, and so is what came out of it.

    Raises:
        MegapromptError: it is damaged, no archive, or has links, devices, paths out of `target`, or too much in it.
    """
    target.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            _extract_zip(archive, target)
        elif tarfile.is_tarfile(archive):
            _extract_tar(archive, target)
        else:
            raise _Unfit("is no zip or tar archive (a web page, maybe)")
    except (_Unfit, *_DAMAGED) as error:
        archive.unlink()
        shutil.rmtree(target)
        why = str(error) if isinstance(error, _Unfit) else f"is damaged or cut off ({error})"
        raise MegapromptError(
            f"the archive {why} and was deleted; fetch it again, or from another address with --url"
        ) from error


def _extract_zip(archive: Path, target: Path) -> None:
    wanted = _filter()
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if it was not packed on Unix
            if wanted(info.filename, info.file_size, info.is_dir() or kind in (0, stat.S_IFREG)):
                file.extract(info, target)


def _extract_tar(archive: Path, target: Path) -> None:
    wanted = _filter()

    def data_filter(info: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        is_wanted = wanted(info.name, info.size, info.isdir() or info.isreg())
        return tarfile.data_filter(info, path) if is_wanted else None

    with tarfile.open(archive) as file:
        file.extractall(target, filter=data_filter)


def _filter() -> Callable[[str, int, bool], bool]:
    """Whether to unpack a member, by name, size, and whether it is a file or directory; counts what it has seen.

    Raises (the returned function):
        _Unfit: the member is dangerous, or it is too much in all.
    """
    count = size = 0

    def wanted(name: str, bytes_: int, plain: bool) -> bool:
        nonlocal count, size
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
            raise _Unfit(f"has a path that leads out of it ({name!r})")
        if not plain:
            raise _Unfit(f"has a link or device in it ({name!r})")
        count, size = count + 1, size + bytes_
        if size > _MAX_UNPACKED or count > _MAX_FILES:
            raise _Unfit(f"would take more than {_MAX_UNPACKED / 1e9:.1f} GB or {_MAX_FILES} files")
        return path.suffix in _WANTED

    return wanted
