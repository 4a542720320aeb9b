"""The command line: `megaprompt COMMAND --help` tells the options. Every command is one Python call elsewhere."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import megaprompt
from megaprompt.errors import MegapromptError, UsageError

_COMMANDS = {
    "probe": "score manual prompts, learn prompts and score them, on a frozen language model",
    "evaluate": "score saved prompts",
    "ask": "ask the model about one subject with a saved prompt",
    "report": "make the report of a run again, or join several runs into one table",
    "status": "tell how far a run is",
    "plan": "tell what a run will need in memory, and whether it fits, before anything is loaded",
    "memory": "measure what training needs in memory, beside what is predicted",
    "data": "fetch published facts, make a vocabulary that several models share, count facts",
    "convert": "convert a fairseq checkpoint such as Megatron 11B, or convert it back",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 if interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    # The deepspeed launcher adds --local_rank=N, which is also in its environment variables.
    args = [arg for arg in args if arg != "--debug" and not arg.startswith("--local_rank=")]
    _quiet(debug)
    try:
        return _run(args)
    except MegapromptError as error:
        if debug:
            raise
        print(f"megaprompt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        how = "the same command goes on" if args[:1] == ["data"] else "continue with --resume"
        print(f"megaprompt: interrupted; {how}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"megaprompt: {what} (unexpected; --debug shows where)", file=sys.stderr)
        return 1


def _run(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print("usage: megaprompt COMMAND [options]\n")
        print("\n".join(f"  {name:10} {about}" for name, about in _COMMANDS.items()))
        print("\nmegaprompt COMMAND --help tells a command's options; --debug shows tracebacks.")
        return 0
    if command == "--version":
        print(f"megaprompt {megaprompt.__version__}")
        return 0
    if command not in _COMMANDS:
        raise UsageError(f"{command}: no such command; choose from {', '.join(_COMMANDS)}")
    # The heavy imports come after the cheap errors.
    handlers: dict[str, Callable[[list[str]], None]] = {
        "probe": _probe,
        "evaluate": _evaluate,
        "ask": _ask,
        "report": _report,
        "status": _status,
        "plan": _plan,
        "memory": _memory,
        "data": _data,
        "convert": _convert,
    }
    handlers[command](args[1:])
    return 0


def _probe(args: list[str]) -> None:
    from megaprompt.config import ProbeConfig, from_yaml, parse
    from megaprompt.distributed.launch import joined_world
    from megaprompt.report.tables import summary_table
    from megaprompt.run.job import probe

    default, args = _config_option(args)
    config = parse(ProbeConfig, args, "megaprompt probe", from_yaml(ProbeConfig, default) if default else None)
    if config.resume and default is None and (saved := config.out / "config.yaml").exists():
        config = parse(ProbeConfig, args, "megaprompt probe", from_yaml(ProbeConfig, saved))
    if config.check:
        from megaprompt.run.preflight import preflight

        return preflight(config)
    with joined_world(force=config.deepspeed is not None) as world:
        results = probe(config, world)
    if world.is_main:
        _print(summary_table(results))
        print(f"results  {config.out / 'results.json'}\nreport   {config.out / 'report.html'}")


def _config_option(args: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` out of the arguments: its options are defaults for the others."""
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            return Path(args[i + 1]), args[:i] + args[i + 2 :]
        if arg.startswith("--config="):
            return Path(arg.removeprefix("--config=")), args[:i] + args[i + 1 :]
    return None, args


def _evaluate(args: list[str]) -> None:
    from rich.table import Table

    from megaprompt.config import EvaluateConfig, parse
    from megaprompt.files import write_file
    from megaprompt.run.ask import evaluate

    config = parse(EvaluateConfig, args, "megaprompt evaluate")
    scores = evaluate(config)
    if config.out is not None:
        write_file(config.out, json.dumps(scores, indent=1, ensure_ascii=False).encode() + b"\n")
    table = Table(title=f"{scores['data']}, {scores['split']}, among {scores['vocabulary']}")
    for column in ("relation", "label", "facts", "P@1", "P@10", "MRR"):
        table.add_column(column, justify="left" if column in ("relation", "label") else "right")
    for name, row in scores["relations"].items():
        table.add_row(name, row["label"], str(row["facts"]), *_percents(row))
    table.add_section()
    for name in ("macro", "micro"):
        table.add_row(name, "", "", *_percents(scores[name]))
    _print(table)


def _percents(row: dict) -> list[str]:
    return [f"{100 * row['p_at_1']:.1f}", f"{100 * row['p_at_10']:.1f}", f"{row['mrr']:.3f}"]


def _ask(args: list[str]) -> None:
    from megaprompt.config import AskConfig, parse
    from megaprompt.run.ask import ask

    config = parse(AskConfig, args, "megaprompt ask")
    for answer, probability in ask(config):
        print(f"{100 * probability:5.1f} %  {answer}")


def _report(args: list[str]) -> None:
    from megaprompt.config import ReportConfig, parse
    from megaprompt.report.html import write_joint_report, write_report
    from megaprompt.report.runs import read_run
    from megaprompt.report.table2 import join
    from megaprompt.report.table2_formats import terminal_table
    from megaprompt.report.tables import summary_table
    from megaprompt.run.merge import merge_runs

    config = parse(ReportConfig, args, "megaprompt report")
    for run in config.runs:
        if parts := sorted(path.parent for path in run.glob("*/results.json")):
            merged = merge_runs(parts, run)
            if len(config.runs) == 1:
                _print(summary_table(merged))
    if len(config.runs) == 1:
        print(write_report(config.runs[0], config.out))
        return
    table = join([read_run(run) for run in config.runs])
    _print(terminal_table(table))
    print(write_joint_report(table, config.out or Path("runs/report")))


def _status(args: list[str]) -> None:
    from megaprompt.config import StatusConfig, parse
    from megaprompt.run.progress import describe_progress, read_progress

    print(describe_progress(read_progress(parse(StatusConfig, args, "megaprompt status").run)))


def _convert(args: list[str]) -> None:
    from megaprompt.backbone.fairseq_bridge import convert, convert_back
    from megaprompt.config import ConvertConfig, parse

    config = parse(ConvertConfig, args, "megaprompt convert")
    if config.to_fairseq:
        convert_back(config.source, config.out, config.parts)
        print(f"{config.out} has {config.parts} part(s) of a fairseq checkpoint")
        return
    convert(config.source, config.out, dtype=config.dtype, tokenizer=not config.no_tokenizer)
    if config.no_tokenizer:
        print(f"{config.out} has no tokenizer: texts cannot be encoded until one is saved there")
    print(f"megaprompt probe --backbone {config.out} ...")


def _plan(args: list[str]) -> None:
    from megaprompt.config import PlanConfig, parse
    from megaprompt.resources.plan import advice, as_json, chart, plans, tables

    config = parse(PlanConfig, args, "megaprompt plan")
    found = plans(config)
    if config.chart is not None:
        chart(config, found).savefig(config.chart, dpi=150)
    if config.json:
        print(json.dumps(as_json(config, found), indent=1))
        return
    for table in tables(config, found):
        _print(table)
    print(advice(config, found))


def _memory(args: list[str]) -> None:
    from megaprompt.config import MemoryConfig, parse
    from megaprompt.resources.measure import measure_all, table

    config = parse(MemoryConfig, args, "megaprompt memory")
    _print(table(measure_all(config)))
    print(f"results  {config.out / 'memory.json'}\nchart    {config.out / 'memory.png'}")


_DATA_COMMANDS = {
    "fetch": "download LAMA, AutoPrompt's or P-tuning's facts",
    "vocabulary": "write the words that are one token for every one of several models",
    "count": "count the facts that a vocabulary leaves to a model",
}


def _data(args: list[str]) -> None:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print("usage: megaprompt data COMMAND [options]\n")
        print("\n".join(f"  {name:10} {about}" for name, about in _DATA_COMMANDS.items()))
        return
    if command not in _DATA_COMMANDS:
        raise UsageError(f"data {command}: no such command; choose from {', '.join(_DATA_COMMANDS)}")
    {"fetch": _data_fetch, "vocabulary": _data_vocabulary, "count": _data_count}[command](args[1:])


def _data_fetch(args: list[str]) -> None:
    from megaprompt.config import FetchConfig, parse
    from megaprompt.tasks.fetch import SOURCES, fetch, fetch_from_hub

    config = parse(FetchConfig, args, "megaprompt data fetch")
    source = SOURCES[config.source]
    out = config.out or Path("data") / config.source
    if config.url is not None:
        source = source._replace(url=config.url, relations_url=None)
    fetched = fetch(source, out) if config.hub is None else fetch_from_hub(config.hub, out)
    facts = ", ".join(f"{count} {split}" for split, count in fetched.facts.items())
    print(f"{out} has {fetched.relations} relations: {facts} facts")
    if fetched.templates < fetched.relations:
        print(f"{fetched.relations - fetched.templates} of the relations have no manual prompt: add to relations.jsonl")
    vocab = f" --vocab {out / fetched.vocabularies[0]}" if fetched.vocabularies else ""
    methods = "" if fetched.facts["train"] else " --methods manual"
    print(f"megaprompt probe --data {out}{vocab}{methods} ...")


def _data_vocabulary(args: list[str]) -> None:
    from megaprompt.backbone import load_tokenizer
    from megaprompt.config import VocabularyConfig, parse
    from megaprompt.files import write_file
    from megaprompt.tasks.lama.facts import read_vocabulary
    from megaprompt.tasks.lama.vocabulary import common_words

    config = parse(VocabularyConfig, args, "megaprompt data vocabulary")
    candidates = None if config.words is None else read_vocabulary(config.words)
    words = common_words([load_tokenizer(name) for name in config.backbones], candidates)
    write_file(config.out, "".join(f"{word}\n" for word in words).encode())
    print(f"{config.out} has {len(words)} words that are one token of {', '.join(config.backbones)}")


def _data_count(args: list[str]) -> None:
    from megaprompt.backbone import load_tokenizer
    from megaprompt.config import CountConfig, parse
    from megaprompt.tasks.lama.facts import load_data
    from megaprompt.tasks.lama.vocabulary import beside_lama, count_facts, count_table

    config = parse(CountConfig, args, "megaprompt data count")
    data = load_data(config.data)
    counts = count_facts(data, config.vocab, load_tokenizer(config.backbone))
    _print(count_table(counts, f"facts of {data.name} for {config.backbone}, --vocab {config.vocab}"))
    if published := beside_lama(counts):
        print(published)


def _print(table: object) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    console.print(table)


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
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    except ImportError as error:
        raise MegapromptError(f"torch cannot be imported ({error}); install the requirements") from error


if __name__ == "__main__":
    sys.exit(main())
