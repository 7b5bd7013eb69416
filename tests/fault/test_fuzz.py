"""Readers of checkpoints accept or refuse, whatever they are given. Millions of inputs: `make fuzz`."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import pytest

from tests.fault import fuzz

CRASHES = sorted(fuzz.CRASHES.glob("*.bin"))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_thousand_broken_inputs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzz, "CRASHES", tmp_path)
    outcome = fuzz.fuzz(name, seed=4, num_inputs=1000)
    assert outcome.failures == []
    assert outcome.num_inputs == 1000
    # Inputs that are all refused at their first byte would test nothing.
    assert outcome.num_accepted >= 5, outcome


@pytest.mark.parametrize("file", CRASHES, ids=lambda file: file.stem)
def test_an_input_that_once_failed(file: Path, tmp_path: Path) -> None:
    reader = fuzz.READERS[file.stem.partition("--")[0]](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.read_one(reader, file.read_bytes())
    reader.check_victim()


class Faulty(fuzz.Names):
    """A reader with one of each fault."""

    def make(self, draw: object) -> bytes:
        return b"x"

    def read(self, content: bytes) -> None:
        number = len(list(self.folder.iterdir()))
        (self.folder / str(number)).touch()
        if number == 1:
            raise KeyError("x")
        if number == 2:
            bytearray(2**31)
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_fuzzer_sees_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzz, "CRASHES", tmp_path)
    monkeypatch.setitem(fuzz.READERS, "names", Faulty)
    outcome = fuzz.fuzz("names", seed=0, num_inputs=5)
    # What a process has found is lost when it ends; the input that ended it is known.
    assert len(outcome.failures) == 1
    assert "number 3" in outcome.failures[0]
    outcome = fuzz.fuzz("names", seed=0, num_inputs=3)
    assert [line.partition(": ")[2].partition(":")[0] for line in outcome.failures] == ["KeyError", "MemoryError"]
