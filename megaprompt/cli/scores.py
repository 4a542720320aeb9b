"""The commands that show scores: of saved prompts on other facts, and of a run beside its repetition."""

from __future__ import annotations

import json
from typing import Any

from megaprompt.config import EvaluateConfig, RerunConfig, SuperGlueConfig
from megaprompt.console import show
from megaprompt.errors import MegapromptError


def evaluate(config: EvaluateConfig) -> None:
    """Score saved prompts on facts."""
    from rich.table import Table
    from rich.text import Text

    from megaprompt.files import write_file
    from megaprompt.report.html import write_report
    from megaprompt.report.runs import beside
    from megaprompt.run.evaluate import evaluate, evaluate_all

    scores = evaluate_all(config) if config.report else evaluate(config)
    if config.out is not None:
        write_file(config.out, json.dumps(scores, indent=1, ensure_ascii=False).encode() + b"\n")
    among = f", among {scores['vocabulary']}" if scores["vocabulary"] else ""
    table = Table(title=Text(f"{scores['data']}, {scores['split']}{among}"))
    labels = any(beside(name, row["label"]) for name, row in scores.get("relations", {}).items())
    names = ("method", "relations") if config.report else ("relation", *["label"] * labels, "facts")
    for column in (*names, "P@1", "P@10", "MRR"):
        table.add_column(column, justify="left" if column in ("method", "relation", "label") else "right")
    for method, found in scores.get("methods", {}).items():
        table.add_row(Text(method), str(found["macro"]["relations"]), *_percents(found["macro"]))
    for name, row in scores.get("relations", {}).items():
        told = [Text(text) for text in (name, *[beside(name, row["label"])] * labels)]
        table.add_row(*told, str(row["facts"]), *_percents(row))
    table.add_section()
    for name in () if config.report else ("macro", "micro"):
        table.add_row(name, *[""] * labels, "", *_percents(scores[name]))
    show(table)
    if config.report:
        print(write_report(config.prompts))


def _percents(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row['p_at_1']:.1f}", f"{100 * row['p_at_10']:.1f}", f"{row['mrr']:.3f}"]


def rerun(config: RerunConfig) -> None:
    """Repeat a run, and tell whether the same comes out."""
    from rich.table import Table
    from rich.text import Text

    from megaprompt.distributed.launch import joined_world
    from megaprompt.run.job import probe, superglue
    from megaprompt.run.rerun import compare, repeated

    options = repeated(config)
    with joined_world(force=options.deepspeed is not None) as world:
        results = superglue(options, world) if isinstance(options, SuperGlueConfig) else probe(options, world)
    if not world.is_main:
        return
    found = compare(config.run, config.out)
    table = Table("method")
    for heading in (f"macro {next(iter(results['metrics'].values()))}, %", "now", "predictions", "differ"):
        table.add_column(heading, justify="right")
    for method, (before, now, count, differ) in found.rows.items():
        scores = ("–" if score is None else f"{100 * score:.1f}" for score in (before, now))
        table.add_row(Text(method), *scores, str(count), str(differ))
    show(table)
    for line in found.origins:
        print(line)
    if not found.same:
        raise MegapromptError(f"{config.out}: its results are not those of {config.run}")
    print(f"the same results as {config.run}")
