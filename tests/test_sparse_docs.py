"""Every snippet of docs/sparse_utils.md runs; the asserts are in the page."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "sparse_utils.md").read_text()
SNIPPETS = re.findall(r"^##+ ([^\n]*)\n(?:(?!^##).)*?```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_no_snippet_is_left_out():
    assert len(SNIPPETS) == PAGE.count("```python")


@pytest.mark.parametrize("snippet", [code for _, code in SNIPPETS], ids=[title for title, _ in SNIPPETS])
def test_the_snippet_runs(snippet):
    torch.manual_seed(0)
    exec(snippet, {})
