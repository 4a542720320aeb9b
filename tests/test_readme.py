"""What the documents tell a reader to type: all of it exists, and what takes seconds is run as it stands there.

Names that the documents use for models and data (gpt2-xl, path/to/lama, ...) are directories here, with small random
models and the facts of the other tests; `...` in a command, which stands for further options, is left out, or is a
new directory for the run.
"""

import inspect
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from cyclopts import App, CycloptsError

from megaprompt.cli import app, main
from megaprompt.errors import MegapromptError
from megaprompt.tasks.lama.facts import load_data
from tests.backbone import megatron_parts
from tests.conftest import make_model, run_cli, write_data
from tests.distributed.test_distributed import torchrun
from tests.methods import test_seams
from tests.test_callback import trainer_for

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ds_configs" / "README.md"]
PROGRAMS = ("make", "megaprompt", "torchrun", "srun", "mpirun", "deepspeed", "bash", "sbatch", "python")
NOT_RUN = {
    "megaprompt data fetch lama": "downloads; tests/tasks/test_fetch.py does it from a local server",
    "megaprompt probe --backbone checkpoints/megatron_11b --deepspeed ds_configs/zero3_bf16.json ...": "the words of "
    "the small checkpoint cannot answer; its logits and gradients are tested in tests/backbone/test_megatron.py",
    "torchrun --nproc-per-node 2 -m megaprompt probe --deepspeed ds_configs/zero3.json --out runs/two-ranks": "is run "
    "by a test of its own, with a small model",
    "megaprompt data fetch fewglue": "likewise",
    "megaprompt export --prompts runs/probe --out exported": "tests/run/test_export.py does it",
    "megaprompt probe --backbone bert-base-cased --max-steps 50 --out runs/own-model": "the small model has no "
    "token for the packaged facts",
    "megaprompt report runs/probe runs/own-model --out runs/both": "of a run that is not made, for that reason; the "
    "page on runs joins others",
    "megaprompt data count --data mine": "words of the packaged model; the data is read by a test of its own",
    "megaprompt probe --data mine --methods manual,in-context,p-tuning --max-steps 50 --out runs/mine": "likewise",
    "megaprompt export --prompts runs/probe --to peft --out adapters": "likewise",
    'megaprompt evaluate --prompts adapter --data other/facts --relations P36 --template "Capital of [X]: [Y]"': (
        "is run in tests/run/test_export.py"
    ),
    "megaprompt superglue --backbone gpt2 --data data/fewglue --methods manual,in-context,p-tuning --out runs/gpt2": (
        "is run with a small model in tests/run/test_superglue.py"
    ),
    "megaprompt superglue --backbone bert-base-cased --data data/fewglue --methods manual,p-tuning --out runs/bert": (
        "likewise"
    ),
    "megaprompt superglue --data path/to/FewGLUE --tasks rte,cb --methods fine-tuning,manual+fine-tuning,p-tuning "
    "--tune both": "likewise",
}
"""Commands for megaprompt that are only parsed, and why."""


class Fence(NamedTuple):
    """A block between lines of three backticks."""

    document: Path
    heading: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Command lines without prompt and comment; with a prompt, lines without it are what was printed."""
        lines = [line.split(" # ")[0].strip() for line in self.text.splitlines()]
        if any(line.startswith("$ ") for line in lines):
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return lines if lines[0].split()[0] in (*PROGRAMS, "cp") and "  " not in lines[0] and not self.language else []


def fences(path: Path) -> Iterator[Fence]:
    heading = ""
    for part in re.finditer(
        r"^#+ (?P<heading>[^\n]*)|^```(?P<language>[^\n]*)\n(?P<text>.*?)^```", path.read_text(), re.M | re.S
    ):
        if part["heading"]:
            heading = part["heading"]
        else:
            yield Fence(path, heading, part["language"], part["text"])


def spans(path: Path) -> list[str]:
    """Code within sentences and tables; where a line ends in it, or `|` is escaped, as it is meant."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return [" ".join(span.split()).replace("\\|", "|") for span in re.findall(r"`([^`]+)`", text)]


FENCES = [fence for path in DOCUMENTS for fence in fences(path)]
SPANS = sorted({span for path in DOCUMENTS for span in spans(path)})
COMMANDS = [
    *(command for fence in FENCES for command in fence.commands),
    *(span for span in SPANS if span.split()[0] in PROGRAMS and " " in span),
]


def for_megaprompt(command: str) -> list[str] | None:
    """What `megaprompt` gets of a command, by a launcher or a Slurm script too; None if it gets nothing."""
    words = [word for word in shlex.split(command) if word != "..."]
    if "megaprompt" in words:
        return words[words.index("megaprompt") + 1 :]
    scripts = [i for i, word in enumerate(words) if word.startswith("slurm/") and word.endswith(".sh")]
    options = [word for word in words[scripts[0] :] if word.startswith("--")] if scripts else []
    return ["probe", *words[words.index(options[0], scripts[0]) :]] if options else None


def parse(args: Sequence[str]) -> None:
    """As the command line does: all options must exist and their values be accepted."""
    app.parse_args(args, exit_on_error=False, print_error=False)


def all_commands(of: App = app, chain: tuple[str, ...] = ()) -> dict[tuple[str, ...], App]:
    found = {}
    for name in (name for name in of if not name.startswith("-")):
        deeper = all_commands(of[name], (*chain, name))
        found |= deeper or {(*chain, name): of[name]}
    return found


ENOUGH = {
    ("evaluate",): ["--prompts", "x"], ("ask",): ["x", "--prompts", "x"], ("report",): ["x"], ("status",): ["x"],
    ("plan",): ["x"], ("convert",): ["x", "x"], ("data", "fetch"): ["lama"],
    ("data", "vocabulary"): ["--backbones", "x", "--out", "x"], ("superglue",): ["--data", "x"],
    ("export",): ["--prompts", "x", "--out", "x"], ("rerun",): ["x", "--out", "x"],
}  # fmt: skip
"""The least that a command needs."""


# ----------------------------------------------------------------------------------------------------- what is named


def test_the_documents_are_understood():
    """So that no test below is empty by mistake."""
    assert {fence.language for fence in FENCES} == {"", "python", "{eval-rst}"}
    assert len([args for command in COMMANDS if (args := for_megaprompt(command))]) > 20
    assert set(NOT_RUN) <= set(COMMANDS)
    assert ("data", "fetch") in all_commands()
    assert set(ENOUGH) <= set(all_commands())


@pytest.mark.parametrize("command", [command for command in COMMANDS if for_megaprompt(command)])
def test_command_lines_can_be_parsed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = for_megaprompt(command)
    assert args is not None
    chains = [chain for chain in all_commands() if list(chain) == args[: len(chain)]]
    assert chains, f"there is no command {args[0]}"
    parse([*args, *(ENOUGH.get(chains[0], []) if args == list(chains[0]) else [])])  # only named: with the least


@pytest.mark.parametrize("span", [s for s in SPANS if (s.startswith("--") or " --" in s) and "SCRIPT" not in s])
def test_options_in_sentences_exist(span, tmp_path, monkeypatch):
    """Such as `--encoder lstm|mlp|none`: some command has them all, and accepts their values."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("seed: 1")
    if span.split()[0] in PROGRAMS:
        return parse(for_megaprompt(span) or [])
    words = shlex.split(span)
    names = {word for word in words if word.startswith("--")}
    possible = {
        chain: enough
        for chain, command in all_commands().items()
        if names
        <= {"--help", *(name for argument in command.assemble_argument_collection() for name in argument.names)}
        and (words[0].startswith("--") or words[0] == chain[-1])
        for enough in [ENOUGH.get(chain, [])]
    }
    assert possible, "no command has these options"
    if len(words) == len(names):
        return None
    mistakes = []
    for chain, enough in possible.items():
        start, given = ([*chain, *enough], words) if words[0].startswith("--") else (list(chain), words[1:])
        try:
            for alternative in range(max(word.count("|") for word in given) + 1):
                parse([*start, *(word.split("|")[alternative] if "|" in word else word for word in given)])
            return None
        except (CycloptsError, MegapromptError) as error:
            mistakes.append(f"{' '.join(chain)}: {error}")
    pytest.fail("\n".join(mistakes))


@pytest.mark.parametrize("target", sorted({c.split()[1] for c in COMMANDS if c.startswith("make ")}))
def test_make_knows_its_targets(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_files_that_are_named_exist():
    folders = {path.name for path in (*ROOT.iterdir(), *(ROOT / "megaprompt").iterdir()) if path.is_dir()}
    words = {word for text in (*COMMANDS, *SPANS) for word in text.split()}
    named = {word for word in words if word.split("/")[0] in folders and "/" in word and not re.search(r"[{*]", word)}
    assert len(named) > 30
    to_write = {"slurm/site.env", "report/", "prompts/", "build/docs"}
    for word in sorted(named - to_write):
        assert (ROOT / word).exists() or (ROOT / "megaprompt" / word).exists(), word


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("[!c]*.sh")), ids=lambda path: path.name)
def test_slurm_scripts_tell_their_usage(script):
    told = subprocess.run(["bash", script, "--help"], check=True, capture_output=True, text=True).stdout
    assert f"bash slurm/{script.name}" in told


# --------------------------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory) -> Path:
    """A directory with what the commands name: models, data, a checkpoint of fairseq, runs."""
    place = tmp_path_factory.mktemp("reader")
    for i, name in enumerate(("gpt2-xl", "bert-base-cased", "roberta-large")):
        make_model("gpt2" if i else "llama", len(tokenizer), seed=i).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in ("path/to/lama", "data/lama", "other/facts"):
        write_data(place / name)
    model = megatron_parts.random_model(megatron_parts.WORDS)
    megatron_parts.write_checkpoint(place / "megatron_11b", model, parts=8)
    megatron_parts.write_dictionaries(place / "megatron_11b")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, backbone in (("x", "gpt2-xl"), ("bert", "bert-base-cased")):
            options = ["--backbone", backbone, "--data", "path/to/lama", "--max-steps", "25", "--out", f"runs/{name}"]
            assert main(["probe", *options]) == 0
        for name in ("probe", "gpt2"):
            shutil.copytree("runs/x", f"runs/{name}")
    return place


RUNNABLE = [fence for fence in FENCES if any(c.startswith("megaprompt ") and c not in NOT_RUN for c in fence.commands)]


@pytest.mark.parametrize("fence", RUNNABLE, ids=lambda fence: fence.heading)
def test_commands_run(fence, place, monkeypatch, capsys):
    """In their order, and if what they print is shown, it looks the same: with other words and figures if the model is
    another one."""
    monkeypatch.chdir(place)
    for command in fence.commands:
        if command.startswith("megaprompt ") and command not in NOT_RUN:
            assert main(for_megaprompt(command.replace("...", "--out runs/new"))) == 0, command
    shown = [line.rstrip() for line in fence.text.splitlines() if line.strip()]
    if not shown[0].startswith("$ "):
        return
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    if " plan " in shown[0]:
        assert printed == shown[1:]
    else:
        assert len(printed) == len(shown) - 1
        assert all(re.fullmatch(r" *\d+\.\d %  \S+", line) for line in (*printed, *shown[1:]))


def test_a_run_has_the_files_that_are_told(place):
    listing = next(fence for fence in FENCES if fence.heading == "Files of a run")
    names = {name for line in listing.text.splitlines() for name in re.split(r", (?=[a-z*.])", line.split("  ")[0])}
    others = {"autoprompt.jsonl", ".tex", ".csv", "state/step-00000150/"}  # of another method; short; of a run before
    assert others < names
    for name in names - others:
        assert list((place / "runs" / "x").glob(name)), name
    assert not (place / "runs" / "x" / "state").exists()
    assert {path.suffix for path in (place / "runs" / "x").glob("table.*")} == {".md", ".tex", ".csv"}


def python_of(heading: str) -> str:
    [code] = [fence.text for fence in FENCES if fence.language == "python" and fence.heading == heading]
    return code


def test_python_runs(place, monkeypatch, capsys, tokenizer):
    """On a small model and data."""
    monkeypatch.chdir(place)
    code, callback, audit = (
        python_of(heading) for heading in ("From Python", "While a model is trained", "Checking and repeating results")
    )
    names = {}
    exec(code.replace("ProbeConfig(", "ProbeConfig(backbone='gpt2-xl', data='path/to/lama', "), names)
    assert 0 <= float(capsys.readouterr().out) <= 1
    names |= {"tokenizer": tokenizer, "trainer": trainer_for(tokenizer, place / "trained", steps=1)}
    exec(callback.replace("ProbeConfig(", "ProbeConfig(data='path/to/lama', "), names)
    assert main(["report", "runs/training"]) == 0
    exec(audit.replace("runs/probe", "runs/two"), names)
    methods = json.loads(Path("runs/two/results.json").read_text())["methods"]
    for method in names["p_at_1"]:
        for relation, score in names["p_at_1"][method].items():
            assert score == pytest.approx(100 * methods[method]["relations"][relation]["p_at_1"])
        assert names["p_at_1"][method].mean() == pytest.approx(100 * methods[method]["macro"]["p_at_1"])


def test_the_task_that_is_shown_is_that_of_the_tests():
    assert python_of("A task") == inspect.getsource(test_seams.Continuations)


def test_a_relation_of_ones_own(place, monkeypatch):
    """The facts that the path of a new user writes can be read, and each split has some."""
    monkeypatch.chdir(place)
    exec(python_of("4. Your own relation"), {})
    [relation] = load_data("mine").relations.values()
    assert relation.template == "The colour of [X] is [Y] ."
    assert {split: len(facts) for split, facts in relation.facts.items()} == {"train": 6, "dev": 4, "test": 4}


@pytest.mark.slow
def test_two_ranks_run(place):
    """With a small model and data, and few steps."""
    [command] = [command for command in COMMANDS if command.startswith("torchrun")]
    small = ["--backbone", "gpt2-xl", "--data", "path/to/lama", "--max-steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert command.split()[1:3] == ["--nproc-per-node", "2"]
        finished = run_cli(*for_megaprompt(command), *small, launcher=torchrun(2), PYTHONPATH=str(ROOT))
    assert finished.returncode == 0, finished.stderr
    assert (place / "runs" / "two-ranks" / "results.json").exists()
