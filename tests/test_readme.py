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
