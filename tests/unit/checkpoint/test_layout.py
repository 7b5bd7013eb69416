"""Names and numbers of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from accelerate.checkpoint import layout


def test_names_of_weights_are_those_every_tool_reads() -> None:
    assert [layout.model_file(i) for i in (0, 1)] == ["model.safetensors", "model_1.safetensors"]
    assert [layout.model_file(i, False) for i in (0, 1)] == ["pytorch_model.bin", "pytorch_model_1.bin"]
    assert layout.shard_file("model.safetensors", 1, 3) == "model-00001-of-00003.safetensors"
    assert layout.shard_file("pytorch_model.bin", 2, 3) == "pytorch_model-00002-of-00003.bin"
    assert layout.shard_file("model.safetensors", 1, 1) == layout.SAFE_WEIGHTS_NAME == layout.model_file(0)
    assert layout.index_file("model.safetensors") == layout.SAFE_WEIGHTS_INDEX_NAME
    assert layout.index_file(layout.model_file(0, False)) == layout.WEIGHTS_INDEX_NAME


def test_a_checkpoint_is_named_by_its_number() -> None:
    assert layout.checkpoint_folder("p", 7) == Path("p/checkpoints/checkpoint_7")
    assert layout.newest_first(["checkpoint_9", "checkpoint_10", "notes", "checkpoint_2"]) == [
        "checkpoint_10",
        "checkpoint_9",
        "checkpoint_2",
    ]


@pytest.mark.parametrize(
    "name", ["checkpoint_", "checkpoint_01", "checkpoint_1x", "xcheckpoint_1", "checkpoint_1\n", "5"]
)
def test_other_folders_are_none_of_ours(name: str) -> None:
    assert layout.checkpoint_number(name) is None


@pytest.mark.parametrize(
    ("limit", "newest", "removed"),
    [
        (None, 3, []),
        (4, 3, []),
        (3, 3, ["checkpoint_0"]),
        (1, 3, ["checkpoint_0", "checkpoint_1", "checkpoint_2"]),
        (0, 3, ["checkpoint_0", "checkpoint_1", "checkpoint_2"]),
        # The new one stays even if older runs reached higher numbers.
        (2, 0, ["checkpoint_1", "checkpoint_2"]),
    ],
)
def test_rotation_keeps_the_newest(limit: int | None, newest: int, removed: list[str]) -> None:
    names = ["checkpoint_2", "other", "checkpoint_0", "checkpoint_3", "checkpoint_1", ".accelerate-saving-1"]
    assert layout.plan_rotation(names, limit, f"checkpoint_{newest}") == removed


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a\0b", "..", "C:/x", "a\\b"])
def test_names_that_lead_out_are_seen(name: str) -> None:
    assert not layout.is_inside(name)
    assert not layout.is_file_name(name)


def test_names_of_a_state() -> None:
    ours = ["optimizer.json", "optimizer_1.safetensors", "random_states_3.pkl", "dl_state_dict_rank0.json", "scaler.pt"]
    ours += ["custom_checkpoint_0.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert all(map(layout.is_checkpoint_file, ours))
    assert not any(map(layout.is_checkpoint_file, ["config.json", "my_model.safetensors", "optimizer.txt", "model.py"]))
    assert layout.custom_indices([*ours, "custom_checkpoint_1.pkl", "custom_checkpoint_1.safetensors"]) == {0, 1}
