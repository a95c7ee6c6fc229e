"""The code in docs/ is run: a guide that no longer works is worse than none."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["numerics.md"])
def test_python_blocks_of_a_page_run_one_after_the_other(name):
    """The guide to a new loss ends in its own assertions."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S)
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": name})
