"""The command line: `megaprompt COMMAND --help` tells the options. Every command is one Python call elsewhere.

What a command needs is imported when it runs, so that help and mistakes come at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter

import megaprompt
from megaprompt.cli.data import data
from megaprompt.cli.scores import evaluate, rerun
from megaprompt.config import (
    AskConfig,
    ConvertConfig,
    ExportConfig,
    MemoryConfig,
    PlanConfig,
    ProbeConfig,
    ReportConfig,
    RunConfig,
    StatusConfig,
    SuperGlueConfig,
    from_yaml,
)
from megaprompt.config.mistakes import said_of
from megaprompt.config.options import READING, read_yaml
from megaprompt.console import show
from megaprompt.errors import MegapromptError

app = App(
    name="megaprompt",
    help="P-tuning and knowledge probing of frozen language models. `megaprompt COMMAND --help` tells a command's "
    "options; --debug shows tracebacks.",
    version=f"megaprompt {megaprompt.__version__}",
    **READING,
)
app.command(data)
app.command(evaluate)
app.command(rerun)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 if interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    # The deepspeed launcher adds --local_rank=N, which is also in its environment variables.
    args = [arg for arg in args if arg != "--debug" and not arg.startswith("--local_rank=")]
    _quiet(debug)
    try:
        app(args)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        code, message = _explain(error, args)
        print(f"megaprompt: {message}", file=sys.stderr)
        return code
    return 0


_GOES_ON = dict.fromkeys(("probe", "superglue", "rerun"), "; continue with --resume") | dict.fromkeys(
    ("data", "convert", "memory"), "; start the command again"
)
"""What to do after an interruption, where something can be done."""


def _explain(error: BaseException, args: Sequence[str]) -> tuple[int, str]:
    """The exit code, and the line for the user."""
    text = " ".join(str(error).split())
    match error:
        case MegapromptError():
            return error.exit_code, str(error)
        case CycloptsError():
            return 2, said_of(error)
        case KeyboardInterrupt():
            return 130, f"interrupted{_GOES_ON.get(next(iter(args), ''), '')}"
        case ImportError():
            return 1, f"{text}; install the requirements"
        case _:
            return 1, f"{type(error).__name__}: {text} (unexpected; --debug shows where)"


def _options_from_file(config: type[RunConfig]) -> Callable[[App, tuple[str, ...], ArgumentCollection], None]:
    """Take options that are not given from the file of --config, or else from the run that is resumed."""

    def read(command: App, _: tuple[str, ...], arguments: ArgumentCollection) -> None:
        file, resume, out = (arguments[f"--{name}"] for name in ("config", "resume", "out"))
        if file.tokens:
            path = Path(file.tokens[-1].value)
        else:
            path = Path(out.tokens[-1].value if out.tokens else config.out) / "config.yaml"
            if not (resume.tokens and path.exists()):
                return
        from_yaml(config, path)  # tells mistakes of the file with its name
        read_yaml(path)(command, (), arguments)  # () since options stand at the top of the file

    return read


OptionsFile = Annotated[Path | None, Parameter(name="--config", show_default=False)]


@app.command(config=_options_from_file(ProbeConfig))
def probe(config: ProbeConfig = ProbeConfig(), *, file: OptionsFile = None) -> None:  # noqa: B008 (frozen)
    """Score manual prompts, learn prompts and score them, on a frozen language model.

    Args:
        file: YAML file of options, such as the config.yaml of a run; options that are given here win.
    """
    from megaprompt.run.job import probe
    from megaprompt.run.material import Facts

    _run(config, lambda: Facts(config), probe)


@app.command(config=_options_from_file(SuperGlueConfig))
def superglue(config: SuperGlueConfig, *, file: OptionsFile = None) -> None:
    """Score manual prompts, learned prompts and fine-tuning on SuperGLUE's tasks.

    Args:
        file: YAML file of options, such as the config.yaml of a run; options that are given here win.
    """
    from megaprompt.run.job import superglue
    from megaprompt.run.material import SuperGlue

    _run(config, lambda: SuperGlue(config), superglue)


def _run(config: Any, read: Callable[[], Any], job: Callable[..., dict[str, Any]]) -> None:
    """Check a run, or do it and show its scores."""
    if config.check:
        from megaprompt.run.preflight import preflight

        return preflight(config, read)
    from megaprompt.distributed.launch import joined_world
    from megaprompt.report.tables import summary_table

    with joined_world(force=config.deepspeed is not None) as world:
        results = job(config, world)
    if world.is_main:
        show(summary_table(results))
        print(f"results  {config.out / 'results.json'}\nreport   {config.out / 'report.html'}")


@app.command
def ask(config: AskConfig) -> None:
    """Ask the model about one subject with a saved prompt."""
    from megaprompt.run.ask import ask

    for answer, probability in ask(config):
        print(f"{100 * probability:5.1f} %  {answer}")


@app.command
def report(config: ReportConfig) -> None:
    """Make the report of a run again, finished or not, join several runs on the same data into one table, or show what
    a model learned while it was trained."""
    from megaprompt.report.html import write_joint_report, write_report
    from megaprompt.report.runs import read_run
    from megaprompt.report.series import steps_in, write_series
    from megaprompt.report.table2 import join
    from megaprompt.report.table2_formats import terminal_table
    from megaprompt.report.tables import summary_table
    from megaprompt.run.merge import merge_runs

    if len(config.runs) == 1 and steps_in(config.runs[0]):
        print(write_series(config.runs[0], config.out))
        return
    for run in config.runs:
        if parts := sorted(path.parent for path in run.glob("*/results.json")):
            merged = merge_runs(parts, run)
            if len(config.runs) == 1:
                show(summary_table(merged))
    if len(config.runs) == 1:
        print(write_report(config.runs[0], config.out))
        return
    table = join([read_run(run) for run in config.runs])
    show(terminal_table(table))
    print(write_joint_report(table, config.out or Path("runs/report")))


@app.command
def export(config: ExportConfig) -> None:
    """Write prompts for transformers alone, or as adapters of PEFT."""
    from megaprompt.run.export import export

    for relation, folder in export(config).items():
        print(f"{relation}  {folder}")


@app.command
def status(config: StatusConfig) -> None:
    """Tell how far a run is, from its progress.json."""
    from megaprompt.run.progress import describe_progress, read_progress

    print(describe_progress(read_progress(config.run)))


@app.command
def plan(config: PlanConfig) -> None:
    """Tell what a run will need in memory, and whether it fits, before anything is loaded."""
    from megaprompt.resources.plan import advice, plans
    from megaprompt.resources.plan_shown import as_json, chart, tables

    found = plans(config)
    if config.write_config is not None:
        from megaprompt.resources.configuration import write_configuration

        found = [write_configuration(config, found[0]), *found]
    if config.chart is not None:
        chart(config, found).savefig(config.chart, dpi=150)
    if config.json:
        print(json.dumps(as_json(config, found), indent=1))
    for table in () if config.json else tables(config, found):
        show(table)
    if not found[0].fits:
        raise MegapromptError(advice(config, found))
    if not config.json:
        print(advice(config, found))


@app.command
def memory(config: MemoryConfig = MemoryConfig()) -> None:  # noqa: B008 (frozen)
    """Measure what training needs in memory, beside what is predicted, with random weights at their true shapes."""
    from megaprompt.resources.measure import measure_all, table

    show(table(measure_all(config)))
    print(f"results  {config.out / 'memory.json'}\nchart    {config.out / 'memory.png'}")


@app.command
def convert(config: ConvertConfig) -> None:
    """Convert a fairseq checkpoint, such as Megatron 11B, into a directory for --backbone, or back."""
    from megaprompt.backbone.fairseq_bridge import convert, convert_back

    if config.to_fairseq:
        convert_back(config.source, config.out, config.parts)
        print(f"{config.out} has {config.parts} part(s) of a fairseq checkpoint")
        return
    convert(config.source, config.out, dtype=config.dtype, tokenizer=not config.no_tokenizer)
    if config.no_tokenizer:
        print(f"{config.out} has no tokenizer: texts cannot be encoded until one is saved there")
    print(f"megaprompt probe --backbone {config.out} ...")


def _quiet(debug: bool) -> None:
    """Say what matters: our own messages, and of the libraries only warnings that concern the user."""
    ranks = ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # not joined yet: whatever launcher it was
    main_rank = all(os.environ.get(name, "0") == "0" for name in ranks)
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_rank else logging.ERROR)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        warnings.filterwarnings("ignore")
        for name in ("deepspeed", "DeepSpeed", "transformers", "httpx", "torch", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
