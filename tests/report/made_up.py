"""Results and runs that are written down here, and what pages and tables show of them."""

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from megaprompt.report.comparison import Comparison, compare
from megaprompt.report.predictions import read_answers
from megaprompt.report.runs import read_run
from megaprompt.report.table2 import Table2, join
from megaprompt.report.table2_formats import lines_of
from megaprompt.report.tables import summary_table

P_AT_1 = {"p_at_1": "P@1", "p_at_10": "P@10", "mrr": "MRR"}
ACCURACY = {"accuracy": "accuracy", "f1": "macro F1"}


def make_results(
    scores: dict[str, dict[str, float | None]], metrics: dict[str, str] = P_AT_1, items: str = "facts", **labels: str
) -> dict:
    """Results with the score `scores[method][relation]`; macro is the mean of those that there are, micro is 0.1 above
    it, and every other metric 0.875."""
    names = list(next(iter(scores.values())))
    score, dev = next(iter(metrics)), f"dev_{next(iter(metrics))}"
    methods = {}
    for method, values in scores.items():
        rows = {}
        for name, value in values.items():
            row = {"type": "N-1", "facts": 40, "epochs": 12 if method == "p-tuning" else None, "template": "[X] [Y] ."}
            other = dict.fromkeys((*metrics, dev), None if value is None or method == "majority" else 0.875)
            rows[name] = row | other | {score: value}
        known = [value for value in values.values() if value is not None]
        mean = sum(known) / len(known) if known else None
        macro = dict.fromkeys((*metrics, dev)) | {score: mean, "relations": len(known)}
        micro = macro | {score: None if mean is None else mean + 0.1}
        methods[method] = {"relations": rows, "macro": macro, "micro": micro, "by_type": {"N-1": macro}}
    left_out = {"object is not one token" if items == "facts" else "too long": 190, "over the limit": 0}
    facts = {"train": 31, "dev": 10, "test": 40}
    about = {"type": "N-1", "template": "[X] [Y] .", "facts": facts, "left_out": left_out}
    return {
        "schema": 2,
        "complete": True,
        "metrics": metrics,
        "items": items,
        "backbone": {
            "name": "tiny", "fingerprint": "ab12", "dtype": "float32", "hidden_size": 576, "parameters": 134515008
        },
        "data": {
            "name": items,
            "vocabulary": {"name": "all tokens", "tokens": 49152} if items == "facts" else None,
            "relations": {name: {"label": labels.get(name, name.lower()), **about} for name in names},
        },
        "methods": methods,
        "environment": {"torch": "2.13", "world_size": 2, "devices": ["cpu", "cpu"]},
        "timing": {"manual": {"seconds": 12.1}, "training_seconds": 3723.4, "p-tuning": {"seconds": None}},
        "peak_memory_bytes": [1 << 30, 3 << 29],
    }  # fmt: skip


def diverge(results: dict, method: str, relation: str, score: float | None, metric: str = "p_at_1") -> None:
    """The training of a relation diverged; its best score before that, or none. Averages are over what is left."""
    row = results["methods"][method]["relations"][relation]
    row |= {"diverged": {"step": 7, "reason": "the loss is nan"}}
    if score is None:
        row |= {name: None for name, value in row.items() if isinstance(value, float)}
    row[metric] = score
    rows = results["methods"][method]["relations"].values()
    known = [row[metric] for row in rows if row[metric] is not None]
    for average in ("macro", "micro"):
        results["methods"][method][average] |= {metric: sum(known) / len(known), "relations": len(known)}


def log_line(relation: str, epoch: int, dev: float | None, best: bool = False, loss: float | None = 1.0) -> dict:
    return {
        "relation": relation,
        "step": 10 * epoch,
        "epoch": epoch,
        "train_loss": loss,
        "dev_p_at_1": dev,
        "best": best,
    }


def write_run(path, results, log=None):
    (path / "results.json").write_text(json.dumps(results))
    if log is not None:
        (path / "log.jsonl").write_text(log if isinstance(log, str) else "".join(json.dumps(r) + "\n" for r in log))
    return path


def change(run: Path, edit) -> None:
    """Edit the results of a run."""
    results = json.loads((run / "results.json").read_text())
    edit(results)
    (run / "results.json").write_text(json.dumps(results))


def joined(*runs: Path) -> Table2:
    return join([read_run(run) for run in runs])


def compared(table: Table2) -> list[Comparison]:
    """What is compared on each backbone."""
    found = [compare(row, read_answers(row, list(table.relations)), table.relations) for row in table.rows]
    return [each for each in found if each is not None]


def shown(table: Table2, average="macro") -> dict[str, dict[str, str]]:
    """Texts of the table by backbone and heading."""
    headings, lines = lines_of(table, average)
    names = [heading.text for heading in headings[1:]]
    return {line[0].text: dict(zip(names, (cell.text for cell in line[1:]), strict=True)) for line in lines}


def write_predictions(run: Path, relation: str, ranks: dict[str, list[int]], names: list[str] | None = None) -> None:
    """Predictions of methods on the same facts, which are called s0, s1, ... unless they have names."""
    lines = []
    for method, of_method in ranks.items():
        for i, rank in enumerate(of_method):
            subject, p = names[i] if names else f"s{i}", 0.9 - 0.01 * i
            top = [["o", p]] if rank == 1 else [["wrong", p], ["o", 0.01]]
            line = {"method": method, "subject": subject, "object": "o", "rank": rank, "probability": p, "top": top}
            lines.append(json.dumps(line) + "\n")
    (run / "predictions").mkdir(exist_ok=True)
    (run / "predictions" / f"{relation}.jsonl").write_text("".join(lines))


class Page(HTMLParser):
    """The tables of a page as lists of rows of (text, class), and all its tags."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tables, self.tags = [], []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", dict(attrs).get("class", "")])
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if getattr(self, "in_cell", False):
            self.tables[-1][-1][-1][0] += data

    def rows(self, table: int) -> dict[str, list[str]]:
        """Rows by their first cell."""
        return {row[0][0]: [text for text, _ in row[1:]] for row in self.tables[table]}

    def bold(self, table: int) -> dict[str, list[str]]:
        return {row[0][0]: [text for text, kind in row if kind == "best"] for row in self.tables[table]}

    def prose(self) -> str:
        return " ".join(html.unescape(re.sub(r"<(style|script)\b.*?</\1>|<[^>]+>", "", self.text, flags=re.S)).split())


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def printed(results, width=100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system="standard").print(summary_table(results))
    return out.getvalue()


def printed_rows(results) -> list[list[str]]:
    return [plain(line).split() for line in printed(results).splitlines()]
