"""The README's example runs and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_prints_what_the_readme_shows() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    shown = re.search(r"<!-- output of the example -->\n```\n(.*?)```", README, re.DOTALL)
    assert example is not None and shown is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example[1], "README.md", "exec"), {})
    assert printed.getvalue() == shown[1]


def test_every_figure_is_one_that_was_measured() -> None:
    table = (Path(__file__).parent.parent / "benchmarks" / "results" / "table.md").read_text()
    measured = {(cells[0], cells[2], cells[4]) for cells in map(_cells, table.splitlines()) if len(cells) == 5}
    shown = README.partition("<!-- figures -->")[2].partition("<!-- /figures -->")[0]
    rows = [_cells(line) for line in shown.splitlines() if line.startswith("| ")][1:]
    assert rows and all(tuple(row) in measured for row in rows)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
