"""The options as data: YAML and back, values as people write them, shipped DeepSpeed configurations; and no torch."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megaprompt import config
from megaprompt.cli import app
from megaprompt.config import (
    MemoryConfig,
    PlanConfig,
    ProbeConfig,
    ReportConfig,
    RunConfig,
    find_configuration,
    from_yaml,
    shipped_configurations,
    to_yaml,
)
from megaprompt.config.options import Dtype, Encoder
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.tasks.lama.facts import SPLITS

ROOT = Path(__file__).parents[1]
CONFIGS = [value for name, value in vars(config).items() if name.endswith("Config") and value is not RunConfig]


def parsed(*args: str):
    """The configuration that a command line gives, without running the command."""
    _, bound, _ = app.parse_args(args, exit_on_error=False, print_error=False)
    return bound.arguments.get("config")


def test_yaml_round_trip(tmp_path):
    given = ("--relations", "P36,P30", "--max-epochs", "7", "--out", "runs/x", "--seed", "3", "--learning-rate", "1e-3")
    options = parsed("probe", *given, "--deepspeed", "zero3", "--discrete", "a=b,c=d", "--check")
    assert options == ProbeConfig(
        relations=("P36", "P30"), max_epochs=7, out=Path("runs/x"), seed=3, learning_rate=1e-3,
        deepspeed=Path("zero3"), discrete=("a=b", "c=d"), check=True,
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(options))
    assert from_yaml(ProbeConfig, path) == options
    path.write_text(to_yaml(ProbeConfig()))
    assert from_yaml(ProbeConfig, path) == ProbeConfig()


def test_a_file_of_another_version(tmp_path):
    """An option that the file does not know has its default; one that this version does not know is named."""
    values = yaml.safe_load(to_yaml(ProbeConfig(max_epochs=7, methods=("manual",))))
    path = tmp_path / "config.yaml"
    for name in ("discrete", "init", "autoprompt_steps", "fine_tuning_rate", "check"):
        del values[name]
    path.write_text(yaml.safe_dump(values))
    assert from_yaml(ProbeConfig, path) == ProbeConfig(max_epochs=7, methods=("manual",))
    path.write_text(yaml.safe_dump(values | {"early_stop": 3}))
    with pytest.raises(UsageError, match=r'config.yaml: Unknown option: "\[early_stop\]"'):
        from_yaml(ProbeConfig, path)


def test_what_older_versions_wrote(tmp_path):
    """Word for word what the version before cyclopts wrote: rates in scientific notation, no dot, are text to YAML."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "backbone: gpt2\ndata: data/lama\nout: runs/x\nmethods:\n- manual\n- p-tuning\ndiscrete: []\n"
        "relations:\n- P36\nvocab: auto\nlimit_facts: null\ntemplate: <3>[X]<3>[Y]\nencoder: lstm\n"
        "init: null\nrecipe: fast\nlearning_rate: 1.0e-05\nweight_decay: 1e-4\nbatch_size: 8\n"
        "max_epochs: null\nmax_steps: null\npatience: null\n"
        "autoprompt_steps: 100\nfine_tuning_rate: 5.0e-06\nseed: 0\ndtype: null\n"
        "deepspeed: null\nrelation_groups: 1\nrow_tokens: 256\npass_tokens: 1024\nresume: false\ncheck: false\n"
    )
    assert from_yaml(ProbeConfig, path) == ProbeConfig(
        backbone="gpt2", data="data/lama", out=Path("runs/x"), relations=("P36",), template="<3>[X]<3>[Y]",
        learning_rate=1e-5, weight_decay=1e-4, batch_size=8, relation_groups=1, pass_tokens=1024,
    )  # fmt: skip


def test_the_last_of_two_counts():
    """As the Slurm scripts say: options that are given again win."""
    options = parsed("probe", "--relations", "P36,P30", "--out", "a", "--relations", "P17", "--out=b", "--resume")
    assert options == ProbeConfig(relations=("P17",), out=Path("b"), resume=True)


def test_arguments_and_options_mix():
    assert parsed("report", "a", "b", "--out", "c") == ReportConfig((Path("a"), Path("b")), out=Path("c"))
    assert parsed("report", "--out", "c", "a", "b") == ReportConfig((Path("a"), Path("b")), out=Path("c"))
    assert parsed("plan", "--nodes", "2", "gpt2", "--json") == PlanConfig("gpt2", nodes=2, json=True)
    assert parsed("memory", "--deepspeed", "none").deepspeed == ("none",)


@pytest.mark.parametrize("one", CONFIGS, ids=lambda one: one.__name__)
def test_every_option_is_in_the_help(one, capsys):
    """With its own text: nothing in it is taken for markup."""
    name = one.__name__.removesuffix("Config").lower()
    app([*(["data"] if name in ("fetch", "vocabulary", "count") else []), name, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    classes = [each for each in one.__mro__ if dataclasses.is_dataclass(each)]
    body = "".join(map(inspect.getsource, classes))  # what is said of an option last comes first
    for field in dataclasses.fields(one):
        assert f"--{field.name.replace('_', '-')}" in text
        about = body[body.index(f"\n    {field.name}: ") :].split('"""')[1]
        assert " ".join(about.replace("`", "").split()) in text


def test_defaults_agree():
    assert PassSize() == PassSize(ProbeConfig().row_tokens, 1024)
    assert PassSize() == PassSize(PlanConfig("gpt2").row_tokens, PlanConfig("gpt2").pass_tokens)
    assert Encoder == EncoderKind
    assert [parsed("evaluate", "--prompts", "x", "--split", split).split for split in SPLITS] == list(SPLITS)
    assert all(parsed("ask", "x", "--prompts", "x", "--dtype", dtype).dtype == dtype for dtype in Dtype.__args__)


# ---------------------------------------------------------------------------------------------- shipped configurations


def test_shipped_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = shipped_configurations()
    assert {path.stem for path in paths} >= {"zero3", "zero3_bf16", "zero3_cpu_offload", "zero3_nvme_offload"}
    assert all(json.loads(path.read_text()) for path in paths)
    for given in ("zero3", "zero3.json", "ds_configs/zero3.json"):
        assert find_configuration(Path(given)) == ROOT / "ds_configs" / "zero3.json"
    for given in ("zero4", "mine/zero3.json", str(tmp_path / "zero3.json")):
        assert find_configuration(Path(given)) == Path(given), "what is not there is left for the reader to tell"
    (tmp_path / "zero3").write_text("{}")
    assert find_configuration(Path("zero3")) == Path("zero3"), "a file of one's own comes first"
    assert all(find_configuration(Path(name)) in paths for name in MemoryConfig().deepspeed)


def test_shipped_configurations_serve_plan_and_check(tmp_path, monkeypatch):
    from megaprompt.distributed.deepspeed_config import read_deepspeed_config
    from megaprompt.resources.plan import plans

    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config(Path("zero3")) == read_deepspeed_config(ROOT / "ds_configs" / "zero3.json")
    names = {plan.name for plan in plans(PlanConfig("gpt2", row_tokens=64, pass_tokens=64))}
    assert names >= {"none", "ds_configs/zero3.json", "ds_configs/zero3_cpu_offload.json"}
    with pytest.raises(UsageError, match="--deepspeed zero4: cannot be read"):
        read_deepspeed_config(Path("zero4"))


# ------------------------------------------------------------------------------------------------------- quick to start

LIGHT = (
    "--help", "--version", "prob", "probe --help", "plan --help", "data fetch --help", "status RUN",
    "probe --max-epochs many", "probe --config nowhere.yaml",
)  # fmt: skip


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_do_not_import_torch(command, tmp_path):
    state = {"state": "running", "phase": "p-tuning", "step": 1, "facts_done": 8, "facts_total": 80, "seconds": 2.0}
    state |= {"score": ["p_at_1", "P@1"], "eta_seconds": None, "updated": 0.0, "relations": {}}
    (tmp_path / "progress.json").write_text(json.dumps(state))
    code = (
        "import sys\n"
        "from megaprompt.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'pandas', 'matplotlib', 'numpy', 'datasets'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    args = [str(tmp_path) if arg == "RUN" else arg for arg in command.split()]
    ended = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    *said, heavy = ended.stdout.splitlines()
    assert heavy == ""
    if command.startswith("prob") and "--help" not in command:
        assert ended.returncode == 2
        assert ended.stderr.startswith("megaprompt: ")
    else:
        assert ended.returncode == 0, ended.stderr
        assert said
