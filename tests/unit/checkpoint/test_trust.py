"""Pickles of either numpy are read, by either numpy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accelerate.checkpoint import trust

MADE = object()
PLACE = SimpleNamespace(multiarray=SimpleNamespace(_reconstruct=MADE))


@pytest.mark.parametrize(
    "numpy",
    [SimpleNamespace(_core=PLACE), SimpleNamespace(core=PLACE), SimpleNamespace(_core=SimpleNamespace(), core=PLACE)],
    ids=["2", "1.24", "1.26"],
)
def test_the_maker_of_arrays_is_found_in_every_numpy(numpy):
    assert trust._reconstruct(numpy) is MADE


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_an_array_of_either_numpy_is_read(tmp_path: Path, module: bytes):
    file = tmp_path / "a.pkl"
    # The old format: one pickle, in which the name of the module can be exchanged.
    torch.save(np.arange(3), file, _use_new_zipfile_serialization=False)
    own = np.arange(1).__reduce__()[0].__module__.encode()
    text = file.read_bytes()
    assert own in text
    file.write_bytes(text.replace(b"c" + own + b"\n", b"c" + module + b"\n"))

    assert trust.read_pickle(file).tolist() == [0, 1, 2]
