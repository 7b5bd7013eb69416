"""Versions, optional packages, names resolved late, and names that clients replace."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest

import accelerate
from accelerate.core import available, versions
from accelerate.core.errors import MissingPackage
from accelerate.core.lazy import lazy_names
from accelerate.core.seam import seam


def test_our_version_is_the_one_that_is_installed():
    assert versions.__version__ == importlib.metadata.version("accelerate") == accelerate.__version__


@pytest.mark.parametrize(
    ("operation", "answer"), [("<", False), ("<=", True), ("==", True), ("!=", False), (">=", True), (">", False)]
)
def test_versions_are_compared_as_versions(operation, answer):
    from packaging.version import parse

    assert versions.compare_versions(parse("2.10"), operation, "2.10.0") is answer
    assert versions.compare_versions(parse("2.10"), ">", "2.9")


def test_an_installed_package_is_compared_by_name():
    assert versions.compare_versions("numpy", ">=", "1.0")
    assert not versions.compare_versions("numpy", "<", "1.0")


def test_the_build_of_torch_is_no_part_of_its_version():
    public = importlib.metadata.version("torch").partition("+")[0]
    assert versions.is_torch_version("==", public)
    assert not versions.is_torch_version(">", public)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="'~=' does not compare versions.*<, <=, ==, !=, >=, >"):
        versions.compare_versions("numpy", "~=", "1.0")


def test_a_folder_named_like_a_package_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_like").mkdir()
    (tmp_path / "wandb_like" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not available.is_installed("wandb_like")
    assert available.is_installed("numpy")
    assert not available.is_installed("surely_not_here_x")


def test_a_missing_package_is_named_with_how_to_get_it():
    with pytest.raises(MissingPackage) as caught:
        available.require("surely_not_here_x", setting="log_with='x'", install="x-tools")
    assert "log_with='x' needs the package 'surely_not_here_x'" in str(caught.value)
    assert "pip install x-tools" in str(caught.value)
    available.require("numpy", setting="anything", install="numpy")


def probes():
    return [name for name in vars(available) if name.startswith("is_") and name.endswith("_available")]


@pytest.mark.parametrize("name", probes())
def test_each_probe_answers_without_importing(name):
    before = set(sys.modules)
    assert getattr(available, name)() in (True, False)
    assert {item.partition(".")[0] for item in set(sys.modules) - before} <= {"importlib"}


def test_probes_say_what_is_installed_here():
    assert available.is_tqdm_available()
    assert not available.is_deepspeed_available()


def test_names_are_resolved_once_and_kept():
    namespace: dict = {}
    get, listed = lazy_names("some.module", {"PrecisionType": "core.enums"}, namespace)
    assert listed() == ["PrecisionType"]
    found = get("PrecisionType")
    assert namespace == {"PrecisionType": found}
    with pytest.raises(AttributeError, match=r"module 'some.module' has no attribute 'Nothing'"):
        get("Nothing")


@pytest.mark.parametrize("module", [accelerate, __import__("accelerate.utils", fromlist=["x"])])
def test_every_offered_name_can_be_had(module):
    assert len(module.__all__) > 15
    for name in module.__all__:
        getattr(module, name)
    assert set(module.__all__) <= set(dir(module))


def test_a_name_replaced_by_a_client_is_found(monkeypatch):
    assert seam("never.loaded", "name", "ours") == "ours"
    face = types.ModuleType("some_face_x")
    monkeypatch.setitem(sys.modules, "some_face_x", face)
    assert seam("some_face_x", "name", "ours") == "ours"
    face.name = "theirs"
    assert seam("some_face_x", "name", "ours") == "theirs"
