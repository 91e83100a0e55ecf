"""What another checkpoint, or another way of drawing, changes: tables of quality compared prompt by prompt."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coser.quality_table import LINES

VERB = "differences"
LEAST_PROMPTS = 2  # a spread needs so many
Scores = dict[str, dict]


@dataclass(frozen=True)
class Difference:
    """What changed of one figure: the mean over `count` prompts that both tables have it of, and its standard error."""

    mean: float
    error: float
    count: int


def load_scores(path: str | Path, column: str = "generated") -> Scores:
    """The row of each ring of a table that `coser.evaluate table` wrote: prompt => name => figure or text.

    path: the table's folder or its table.json. Raises ValueError where there is no table or no such column.
    """
    file = Path(path) / "table.json" if Path(path).is_dir() else Path(path)
    try:
        columns = json.loads(file.read_text("utf-8"))["rings"]
        return {row["prompt"]: row for row in columns[column]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a table of quality with a column {column!r}, got {error!r}") from error


def judge_of(path: str | Path) -> str | None:
    """The fingerprint of the judge that a table tells; None where it tells none."""
    file = Path(path) / "table.json" if Path(path).is_dir() else Path(path)
    return json.loads(file.read_text("utf-8")).get("judge")


def differences(base: Scores, other: Scores) -> dict[str, Difference]:
    """Figure => what `other` has more of it than `base`, within the prompts that both were asked.

    Figures that fewer than LEAST_PROMPTS prompts have in both are left out. Raises ValueError where no prompt is in
    both.
    """
    common = [prompt for prompt in base if prompt in other]
    if not common:
        raise ValueError(f"tables must have prompts in common to be compared, got {len(base)} and {len(other)} others")
    found = {}
    for line in LINES:
        changes = [other[p][line.figure] - base[p][line.figure] for p in common
                   if line.figure in base[p] and line.figure in other[p]]
        if len(changes) >= LEAST_PROMPTS:
            found[line.figure] = Difference(statistics.fmean(changes),
                                            statistics.stdev(changes) / math.sqrt(len(changes)), len(changes))
    return found


def differences_table(base: Scores, others: Sequence[Scores], names: Sequence[str]) -> str:
    """The differences as Markdown, a column for each of `others`; names: the base's, then theirs.

    The base's own figures are of the prompts that any of the others has, too.
    """
    changes = [differences(base, other) for other in others]
    lines = [f"| mean over the prompts | prompts | {' | '.join(names)} |", "|---|" + "--:|" * (len(names) + 1)]
    for line in LINES:
        told = [change.get(line.figure) for change in changes]
        if not any(told):
            continue
        asked = [p for p in base if line.figure in base[p] and any(line.figure in o.get(p, {}) for o in others)]
        mean = statistics.fmean(base[p][line.figure] for p in asked)
        counts = "/".join(sorted({str(change.count) for change in told if change}, key=int))
        cells = [line.form.format(mean), *("" if change is None else _cell(change, line.form) for change in told)]
        lines.append(f"| {line.label} | {counts} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(change: Difference, form: str) -> str:
    """A mean with its sign, and its standard error, in the form of the figure."""
    return f"{form.replace(':', ':+').format(change.mean)} ± {form.format(change.error)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="folder (or table.json) that coser.evaluate table wrote")
    parser.add_argument("others", type=Path, nargs="+", help="tables of the same prompts and judge, drawn otherwise")


def run(options: argparse.Namespace) -> None:
    tables = [options.base, *options.others]
    base, *others = map(load_scores, tables)
    judges = {judge_of(table) for table in tables} - {None}
    if len(judges) > 1:
        raise ValueError(f"tables must be of one judge to be compared, got {' and '.join(sorted(judges))}")
    print(differences_table(base, others, [table.name if table.is_dir() else table.parent.name for table in tables]))
