"""Downloads from a real HTTP server on this machine, which cuts connections and serves what an attacker would."""

import hashlib
import io
import json
import stat
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaprompt.cli import main
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.tasks import download as downloading
from megaprompt.tasks import fetch as fetching
from megaprompt.tasks.download import download, extract
from megaprompt.tasks.fetch import SOURCES, fetch
from megaprompt.tasks.lama.facts import load_data, read_vocabulary
from megaprompt.tasks.releases import RELEASES
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.reading import read_superglue
from tests.tasks.bear_data import write_bear
from tests.tasks.superglue.made_up import write_superglue

FACT = {"sub_label": "Denmark", "obj_label": "Copenhagen", "uuid": "1", "evidences": [{"masked_sentence": "long"}]}
RELATION = {"relation": "P36", "template": "The capital of [X] is [Y] .", "label": "capital", "type": "1-1"}
ELSEWHERE = {"relation": "P999", "template": "[X] [Y]", "label": "not in the data", "type": "N-M"}


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


LAMA = {
    "data/TREx/P36.jsonl": lines(FACT, {**FACT, "sub_label": "Åland"}),
    "data/TREx/._P36.jsonl": b"\0Mac\0",
    "data/Squad/test.jsonl": lines({"id": "1"}),
    "data/relations.jsonl": lines(RELATION, ELSEWHERE),
    "data/picture.png": b"png",
}
SPLIT = {f"LAMA/fact-retrieval/original/P36/{split}.jsonl": lines(FACT) for split in ("train", "dev", "test")}
P_TUNING = {
    **SPLIT,
    "LAMA/relations.jsonl": lines(RELATION),
    "LAMA/29k-vocab.json": json.dumps({"gpt2-xl": ["ĠParis"], "bert-base-cased": {"Paris": 1, "##s": 2}}).encode(),
    "LAMA/34k-vocab.json": json.dumps({"roberta-large": ["ĠParis", "ĠCopenhagen"]}).encode(),
}


def zipped(files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tarred(files, *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for info in extra:
            file.addfile(info)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `files`; each of `cuts` ends one answer after so many bytes, each of `refusals` is one status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.lengths = True
        self.cuts: list[int] = []
        self.refusals: list[int] = []
        self.asked: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, name = self.server, self.path.lstrip("/").partition("?")[0]
        server.asked.append(name)
        content = server.files.get(name)
        if content is None or server.refusals:
            return self.send_error(server.refusals.pop(0) if server.refusals else 404)
        self.send_response(200)
        if server.lengths:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: server.cuts.pop(0)] if server.cuts else content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ------------------------------------------------------------------------------------------------------- whole commands


def test_lama(server, tmp_path, capsys):
    server.files["data.zip"] = zipped(LAMA)
    out = tmp_path / "data" / "lama"
    assert main(["data", "fetch", "lama", "--out", str(out), "--url", server.url("data.zip")]) == 0
    data = load_data(str(out))
    assert data.relations["P36"].facts == {
        "train": [],
        "dev": [],
        "test": [("Denmark", "Copenhagen"), ("Åland", "Copenhagen")],
    }
    assert data.relations["P36"].template == RELATION["template"]
    assert list(data.relations) == ["P36"]
    assert "P999" not in (out / "relations.jsonl").read_text()
    assert json.loads((out / "trex" / "test" / "P36.jsonl").read_text().splitlines()[0]) == {
        key: value for key, value in FACT.items() if key != "evidences"
    }
    assert json.loads((out / "source.json").read_text())["bytes"] == len(server.files["data.zip"])
    assert list(out.parent.iterdir()) == [out], "the archive is gone"
    text = capsys.readouterr().out
    assert "1 relations: 0 train, 0 dev, 2 test facts" in text
    assert "--methods manual" in text

    assert main(["data", "fetch", "lama", "--out", str(out), "--url", server.url("data.zip")]) == 2
    assert "exists" in capsys.readouterr().err


def test_p_tuning_lama_comes_with_its_vocabularies(server, tmp_path, capsys):
    server.files["x.tar.gz"] = tarred(P_TUNING)
    out = tmp_path / "p-tuning"
    assert main(["data", "fetch", "p-tuning-lama", "--out", str(out), "--url", server.url("x.tar.gz")]) == 0
    data = load_data(str(out))
    assert {split: len(facts) for split, facts in data.relations["P36"].facts.items()} == {
        "train": 1,
        "dev": 1,
        "test": 1,
    }
    assert data.vocabulary is None, "two: the user has to choose"
    assert read_vocabulary(out / "vocab" / "29k.txt") == ["Paris"]
    assert read_vocabulary(out / "vocab" / "34k.txt") == ["Paris", "Copenhagen"]
    assert f"--vocab {out / 'vocab' / '29k.txt'}" in capsys.readouterr().out


def test_autoprompt_takes_templates_from_elsewhere(server, tmp_path, capsys):
    inside = {
        name.replace("LAMA/fact-retrieval/original", "data/autoprompt_data"): text for name, text in SPLIT.items()
    }
    server.files |= {"x.tar.gz": tarred({**inside, "data/LAMA-TREx/P36.jsonl": lines(FACT)})}
    server.files["relations.jsonl"] = lines(RELATION)
    source = SOURCES["autoprompt-trex"]._replace(url=server.url("x.tar.gz"))
    fetch(source._replace(relations_url=server.url("relations.jsonl")), tmp_path / "with")
    assert load_data(str(tmp_path / "with")).relations["P36"].template == RELATION["template"]
    assert len(load_data(str(tmp_path / "with")).relations["P36"].facts["train"]) == 1

    arguments = ["--out", str(tmp_path / "without"), "--url", source.url]
    assert main(["data", "fetch", "autoprompt-trex", *arguments]) == 0
    assert load_data(str(tmp_path / "without")).relations["P36"].template is None
    assert "1 of the relations have no manual prompt" in capsys.readouterr().out


def superglue_files(tmp_path: Path) -> dict[str, bytes]:
    """Made-up files of the seven tasks by their paths."""
    root = write_superglue(tmp_path / "made")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.jsonl"))}


def test_superglue_is_an_archive_for_each_task(server, tmp_path, capsys):
    files = superglue_files(tmp_path)
    for task in KINDS:
        of_task = {name: text for name, text in files.items() if name.startswith(f"{task}/")}
        server.files[f"v2/{task}.zip"] = zipped(of_task | {f"{task}/test.jsonl": b"{}", "__MACOSX/x.jsonl": b"\0"})
    out = tmp_path / "superglue"
    assert main(["data", "fetch", "superglue", "--out", str(out), "--url", server.url("v2/")]) == 0
    text = capsys.readouterr().out
    assert "7 tasks, as --setting full reads them" in text
    assert f"megaprompt superglue --setting full --data {out}" in text
    assert {p.name for p in out.rglob("*.jsonl")} == {"train.jsonl", "val.jsonl"}, "test has no labels"
    assert (out / "CB" / "val.jsonl").read_bytes() == files["CB/val.jsonl"]
    assert len(read_superglue(out, "full")) == 7
    source = json.loads((out / "source.json").read_text())
    assert [each["url"] for each in source] == [server.url(f"v2/{task}.zip") for task in KINDS]
    assert main(["data", "fetch", "superglue", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_archives_that_are_there_are_not_fetched_again(server, tmp_path, capsys):
    files = superglue_files(tmp_path)
    for task in KINDS:
        server.files[f"{task}.zip"] = zipped({name: text for name, text in files.items() if name.startswith(task)})
    last = server.files.pop("WSC.zip")
    arguments = ["data", "fetch", "superglue", "--out", str(tmp_path / "out"), "--url", server.url("")]
    assert main(arguments) == 1
    assert "WSC.zip: the server says 404" in capsys.readouterr().err
    server.files["WSC.zip"], server.asked = last, []
    assert main(arguments) == 0
    assert server.asked == ["WSC.zip"]


def test_fewglue_is_a_part_of_a_repository(server, tmp_path, capsys):
    files = {f"P-tuning-f4225d4/FewGLUE_32dev/{name}": text for name, text in superglue_files(tmp_path).items()}
    server.files["x.zip"] = zipped(files | {"P-tuning-f4225d4/LAMA/data.jsonl": b"{}"})
    out = tmp_path / "fewglue"
    assert main(["data", "fetch", "fewglue", "--out", str(out), "--url", server.url("x.zip")]) == 0
    assert "megaprompt superglue --setting few-shot" in capsys.readouterr().out
    assert len(read_superglue(out, "few-shot")["RTE"].examples["dev"]) == 6
    del files["P-tuning-f4225d4/FewGLUE_32dev/WiC/dev32.jsonl"]
    server.files["y.zip"] = zipped(files)
    arguments = ["data", "fetch", "fewglue", "--out", str(tmp_path / "other"), "--url", server.url("y.zip")]
    assert main(arguments) == 1
    assert "WiC/dev32.jsonl is in no archive from there" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    files["P-tuning-f4225d4/FewGLUE_32dev/WiC/dev32.jsonl"] = b'{"idx": 0, "word": "cat"}\n'
    server.files["y.zip"] = zipped(files)
    assert main(arguments) == 1
    assert 'WiC/dev32.jsonl:1: "sentence1" is missing' in capsys.readouterr().err


def test_bear_is_two_directories_of_a_repository(server, tmp_path, capsys):
    root = write_bear(tmp_path / "made")
    files = {f"BEAR-725b4e3/{p.relative_to(root).as_posix()}": p.read_bytes() for p in root.rglob("*.json*")}
    server.files["x.tar.gz"] = tarred(files | {"BEAR-725b4e3/README.md": b"", "BEAR-725b4e3/other/P1.jsonl": b"{}"})
    out = tmp_path / "bear"
    assert main(["data", "fetch", "bear", "--out", str(out), "--url", server.url("x.tar.gz")]) == 0
    fetched, made = load_data(str(out)), load_data(str(root))
    assert fetched.whole_answers
    assert {name: each.facts for name, each in fetched.relations.items()} == {
        name: each.facts for name, each in made.relations.items()
    }
    assert f"{len(made.relations)} relations: " in capsys.readouterr().out


def test_every_release_has_https_addresses():
    for release in RELEASES.values():
        assert all(url.startswith("https://") and url.endswith(".zip") for url in release.addresses())
    assert RELEASES["superglue"].addresses()[0] == "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/BoolQ.zip"


def test_every_source_has_an_https_address():
    for source in SOURCES.values():
        assert source.url.startswith("https://")
    assert SOURCES["autoprompt-trex"].relations_url in fetching.CHECKSUMS


def test_wrong_commands(tmp_path, capsys):
    assert main(["data", "fetch", "nonsense"]) == 2
    assert main(["data", "nonsense"]) == 2
    assert main(["data", "fetch", "lama", "--out", str(tmp_path / "x"), "--url", "archive.zip"]) == 2
    assert "is no address" in capsys.readouterr().err
    assert main(["data"]) == 0
    assert "vocabulary" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- downloading


def test_a_cut_connection_is_tried_again(server, tmp_path):
    server.files["x"] = content = bytes(range(256)) * 100
    server.cuts = [10_000, 5_000]
    assert download(server.url("x"), tmp_path).read_bytes() == content
    assert server.asked == ["x"] * 3
    assert len(list(tmp_path.iterdir())) == 1, "the broken ones are gone"


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    server.files |= {"x": b"of x", "y": b"of y"}
    checksum = hashlib.sha256(b"of x").hexdigest()
    path = download(server.url("x"), tmp_path)
    assert download(server.url("x"), tmp_path) == path
    assert download(server.url("x"), tmp_path, checksum) == path
    assert server.asked == ["x"]
    assert download(server.url("y"), tmp_path).read_bytes() == b"of y", "another address is another file"
    path.write_bytes(b"damaged")
    assert download(server.url("x"), tmp_path, checksum).read_bytes() == b"of x"
    assert server.asked == ["x", "y", "x"]


def test_a_connection_that_breaks_every_time(server, tmp_path):
    server.files["x"] = bytes(range(256)) * 100
    server.cuts = [10_000] * 20
    with pytest.raises(MegapromptError, match=r"the download failed 4 times .*10000 bytes read"):
        download(server.url("x"), tmp_path)
    assert len(server.asked) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.files["x"] = b"content"
    server.refusals = [503, 429]
    assert download(server.url("x"), tmp_path).read_bytes() == b"content"
    server.asked = []
    with pytest.raises(MegapromptError, match="404"):
        download(server.url("z"), tmp_path)
    assert len(server.asked) == 1


def test_nobody_answers(server, tmp_path):
    url = server.url("x")
    server.shutdown()
    server.server_close()
    with pytest.raises(MegapromptError, match=r"failed 4 times .*refused"):
        download(url, tmp_path)


@pytest.mark.parametrize("url", ["archive.zip", "ftp://host/archive.zip", "http://", "http://[1/x"])
def test_no_address(tmp_path, url):
    with pytest.raises(UsageError, match="is no"):
        download(url, tmp_path)


def test_progress_is_told_in_kilobytes(server, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def progress(description, total, unit):
        yield lambda *args: told.append((description, unit, *args))

    monkeypatch.setattr(downloading, "progress", progress)
    server.files["x.zip"] = bytes(50_000)
    download(server.url("x.zip?download=1"), tmp_path)
    assert told[-1] == ("downloading x.zip", "kB", 50, 50)


def test_a_wrong_checksum_is_found_and_the_file_deleted(server, tmp_path):
    server.files["x"] = b"corrupted"
    with pytest.raises(MegapromptError, match="is not the published one"):
        download(server.url("x"), tmp_path, "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_the_published_checksum_is_asked_for(server, tmp_path, monkeypatch):
    server.files["x"] = GOOD_ZIP
    monkeypatch.setitem(fetching.CHECKSUMS, server.url("x"), "0" * 64)
    with pytest.raises(MegapromptError, match="is not the published one"):
        fetch(SOURCES["lama"]._replace(url=server.url("x")), tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ archives


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_link() -> bytes:
    info = zipfile.ZipInfo("data/TREx/P1.jsonl")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return zipped({**LAMA, info: "/etc/passwd"})


GOOD_TAR, GOOD_ZIP = tarred(LAMA), zipped(LAMA)
BAD = {
    "zip, up": (zipped({**LAMA, "../outside.txt": "x"}), "leads out of it"),
    "zip, up inside": (zipped({**LAMA, "data/../../outside.txt": "x"}), "leads out of it"),
    "zip, absolute": (zipped({**LAMA, "/outside.txt": "x"}), "leads out of it"),
    "zip, backslashes": (zipped({**LAMA, "..\\outside.txt": "x"}), "leads out of it"),
    "zip, drive": (zipped({**LAMA, "C:outside.txt": "x"}), "leads out of it"),
    "zip, link": (zip_link(), "link or device"),
    "tar, up": (tarred(LAMA, member("../outside.txt")), "leads out of it"),
    "tar, absolute": (tarred(LAMA, member("/tmp/outside.txt")), "leads out of it"),
    "tar, link": (tarred(LAMA, member("data/a.txt", tarfile.SYMTYPE, "../..")), "link or device"),
    "tar, hard link": (tarred(LAMA, member("data/a.txt", tarfile.LNKTYPE, "/etc/passwd")), "link or device"),
    "tar, device": (tarred(LAMA, member("data/a.txt", tarfile.CHRTYPE)), "link or device"),
    "tar, pipe": (tarred(LAMA, member("data/a.txt", tarfile.FIFOTYPE)), "link or device"),
    "tar, cut off": (GOOD_TAR[: len(GOOD_TAR) // 2], "damaged or cut off"),
    "zip, cut off": (GOOD_ZIP[: len(GOOD_ZIP) // 2], "is no zip or tar archive"),
    "zip, corrupt": (GOOD_ZIP[:50] + b"\xff" * 20 + GOOD_ZIP[70:], "damaged or cut off"),
    "web page": (b"<html>Sign in</html>", "is no zip or tar archive"),
    "another data set": (zipped({"other/train.txt": "x"}), "has no directory TREx"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_leave_nothing(server, tmp_path, name):
    server.files["x"], message = BAD[name]
    server.lengths = False  # as chunked answers: nothing tells that it was cut off
    out = tmp_path / "below" / "out"
    with pytest.raises(MegapromptError, match=message):
        fetch(SOURCES["lama"]._replace(url=server.url("x")), out)
    assert not out.exists()
    assert not list(tmp_path.rglob("outside.txt"))
    left = (tmp_path / "below" / ".out.partial").iterdir()
    assert not [path for path in left if path.is_file()], "it would be taken for a good download"
    server.files["x"] = GOOD_ZIP
    fetch(SOURCES["lama"]._replace(url=server.url("x")), out)
    assert load_data(str(out)).relations["P36"].facts["test"]


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize(("limit", "value"), [("_MAX_UNPACKED", 1_000_000), ("_MAX_FILES", 3)])
def test_bombs(tmp_path, monkeypatch, pack, limit, value):
    monkeypatch.setattr(downloading, limit, value)
    (tmp_path / "archive").write_bytes(pack({f"data/{i}.txt": b"0" * 400_000 for i in range(4)}))
    assert (tmp_path / "archive").stat().st_size < 10_000
    with pytest.raises(MegapromptError, match="would take more than"):
        extract(tmp_path / "archive", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_zip_that_lies_about_sizes(tmp_path):
    content = bytearray(zipped({"a.txt": b"0" * 100_000}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # uncompressed size
        at = content.index(signature) + offset
        content[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(MegapromptError, match="damaged"):
        extract(tmp_path / "archive", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_malformed_facts_leave_nothing(server, tmp_path):
    server.files["x"] = zipped({**LAMA, "data/TREx/P37.jsonl": b'{"sub_label": "Denmark"}\n'})
    with pytest.raises(MegapromptError, match=r'P37\.jsonl:1: "obj_label" is missing'):
        fetch(SOURCES["lama"]._replace(url=server.url("x")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_killed_call_do_not_get_in(server, tmp_path):
    server.files["x"] = GOOD_ZIP
    work = tmp_path / ".out.partial"
    for name in ("unpacked", "whole"):
        (work / name / "trex" / "test").mkdir(parents=True)
        (work / name / "trex" / "test" / "P1.jsonl").write_text("half")
    fetch(SOURCES["lama"]._replace(url=server.url("x")), tmp_path / "out")
    assert list(load_data(str(tmp_path / "out")).relations) == ["P36"]


def test_out_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MegapromptError, match="cannot write"):
        fetch(SOURCES["lama"]._replace(url=server.url("x")), tmp_path / "file" / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        fetch(SOURCES["lama"], tmp_path / "there")


# ------------------------------------------------------------------------------------------------------- the model hub


@pytest.fixture
def hub(tmp_path) -> Path:
    """A data set with the columns of facebook/lama, as `datasets` loads it: a row for each sentence."""
    from datasets import Dataset

    fact = {
        "predicate_id": "P36", "uuid": "1", "sub_uri": "Q35", "sub_label": "Denmark", "obj_uri": "Q1748",
        "obj_label": "Copenhagen", "masked_sentence": "long", "template": "The capital of [X] is [Y] .",
        "label": "capital", "type": "1-1",
    }  # fmt: skip
    other = {**fact, "uuid": "2", "sub_label": "Åland"}
    third = {**fact, "predicate_id": "P30", "uuid": "3", "obj_label": "Europe", "template": "[X] is in [Y] ."}
    path = tmp_path / "hub"
    (path / "trex").mkdir(parents=True)
    Dataset.from_list([fact, {**fact, "masked_sentence": "another"}, third, other]).to_parquet(
        path / "trex" / "0.parquet"
    )
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: trex\n  data_files:\n  - split: train\n    path: trex/*.parquet\n---\n"
    )
    return path


def test_lama_from_the_model_hub(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "lama"
    assert main(["data", "fetch", "lama", "--hub", str(hub), "--out", str(out)]) == 0
    assert "2 relations: 0 train, 0 dev, 3 test facts" in capsys.readouterr().out
    data = load_data(str(out))
    assert [(fact.subject, fact.object) for fact in data.relations["P36"].facts["test"]] == [
        ("Denmark", "Copenhagen"),
        ("Åland", "Copenhagen"),
    ]
    assert data.relations["P30"].template == "[X] is in [Y] ."
    assert json.loads((out / "source.json").read_text()) == {"hub": str(hub)}
    assert main(["data", "fetch", "lama", "--hub", str(hub), "--out", str(out)]) == 2


def test_what_the_hub_does_not_have(hub, tmp_path, capsys):
    (hub / "trex" / "0.parquet").unlink()
    assert main(["data", "fetch", "lama", "--hub", str(hub), "--out", str(tmp_path / "lama")]) == 1
    assert f"--hub {hub}: " in capsys.readouterr().err
    assert not (tmp_path / "lama").exists()
    assert main(["data", "fetch", "p-tuning-lama", "--hub", str(hub)]) == 2
