"""The report of a sweep's folder: tables, figures with their numbers, one page. Computes nothing anew."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from hpcguard.progress import say
from hpcguard.reporting.html import render_page
from hpcguard.reporting.sweep_page import notes, page_values, pictures, sheets, spoken
from hpcguard.reporting.sweep_pictures import NAMES
from hpcguard.reporting.sweep_tables import sheets_latex, sheets_markdown
from hpcguard.runs import publish
from hpcguard.store.tidy import write_tidy
from hpcguard.sweeps.analysis import Analysis, analyse
from hpcguard.sweeps.commands import cell_commands, job_commands, shown_path
from hpcguard.sweeps.cost import cost_lines, costs
from hpcguard.sweeps.evidence import cell_states, job_states
from hpcguard.sweeps.folder import SweepFolder, read_plan
from hpcguard.sweeps.table import axes_of, columns, rows, to_csv, units


def write_report(folder: SweepFolder) -> None:
    """Write table.csv, .h5, .md and .tex and report/ of what is there, the page last; say what they show."""
    graph, alike, control = read_plan(folder)
    states = [state for state, _ in cell_states(graph, job_states(folder, graph, alike))]
    table = rows(folder, graph, alike, states)
    analysis = analyse(table, axes_of(graph), control)
    _write_tables(folder, analysis)
    drawn = pictures(analysis)
    for picture in drawn:
        _write(folder.report.with_name(picture.name), picture.png)
        _write(folder.report.with_name(picture.csv_name), picture.csv.encode())
    for name in set(NAMES) - {picture.name for picture in drawn}:  # of an earlier report
        for old in (folder.report.with_name(name), folder.report.with_name(name).with_suffix(".csv")):
            old.unlink(missing_ok=True)
    commands = cell_commands(graph, job_commands(folder, graph))
    cost = cost_lines(graph, costs(folder, graph, alike))
    values = page_values(shown_path(folder), analysis, drawn, cost, commands, _sweep(folder), alike)
    _write(folder.report, render_page(values, "sweep.html.j2").encode())
    for line in spoken(analysis):
        say(line)
    say(f"report: {folder.report}")


def _write_tables(folder: SweepFolder, analysis: Analysis) -> None:
    text = to_csv(analysis.table).encode()
    _write(folder.table, text)
    told, paper = notes(analysis), sheets(analysis)
    _write(folder.summary, sheets_markdown(paper, told).encode())
    _write(folder.path / "table.tex", sheets_latex(paper, told).encode())
    by_column = {name: [row.get(name) for row in analysis.table] for name in columns(analysis.table)}
    with publish(folder.path / "table.h5") as temporary:
        write_tidy(temporary, by_column, units(analysis.table, analysis.axes), hashlib.sha256(text).hexdigest())


def _sweep(folder: SweepFolder) -> dict[str, Any]:
    """The sweep's settings, for the page to show; empty where they cannot be read."""
    try:
        values = yaml.safe_load(folder.sweep.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, content: bytes) -> None:
    with publish(path) as temporary:
        temporary.write_bytes(content)
