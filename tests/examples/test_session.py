"""The page with a person's first session shows what still happens."""

from __future__ import annotations

import re
import shutil

import pytest

from .session import PAGE, play


def shape(page: str) -> str:
    """Return a page without what differs between machines and versions of torch."""
    return re.sub(r"[0-9a-f]{64}|\d+(\.\d+)?", "N", page)


@pytest.mark.full
def test_the_session_on_the_page_is_what_happens_in_a_terminal():
    if shutil.which("tmux") is None:
        pytest.skip("needs the program tmux")
    assert shape(play()) == shape(PAGE.read_text())


def test_the_page_goes_from_the_first_question_to_a_run_that_ends_well():
    page = PAGE.read_text()
    parts = [
        "$ accelerate config",
        "How shall scripts run?",
        "configuration saved at",
        "$ accelerate launch",
        "status 0",
    ]
    assert [page.find(part) for part in parts] == sorted(page.find(part) for part in parts)
    assert -1 not in [page.find(part) for part in parts]
