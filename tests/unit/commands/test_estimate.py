"""`accelerate estimate-memory`: the figures, and where they come from."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from accelerate.commands import estimate
from accelerate.commands.estimate import create_ascii_table, layers_of, main, rows_of
from accelerate.core.available import is_installed

TENSORS = {"emb.weight": (10, 4), "layers.0.a": (10, 10), "layers.0.b.c": (10,), "layers.1.a": (10, 10), "scale": ()}
FLOAT32 = {"dtype": "float32", "largest_layer_bytes": 440, "total_bytes": 1004, "training_bytes": 4016}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in TENSORS.items()}


def rows(capsys, *words: object) -> list[dict[str, object]]:
    main([*(str(word) for word in words), "--json"])
    return json.loads(capsys.readouterr().out)["rows"]


def test_a_layer_is_a_block_that_repeats_or_a_module():
    assert layers_of({
        "model.embed.weight": 7, "model.layers.0.mlp.experts.3.w": 1, "model.layers.0.mlp.experts.4.w": 2,
        "model.layers.1.attention.q.weight": 4, "model.norm.weight": 8, "model.norm.bias": 16, "0.weight": 32, "alone": 64,
    }) == {"model.embed": 7, "model.layers.0": 3, "model.layers.1": 4, "model.norm": 24, "0": 32, "alone": 64}  # fmt: skip


def test_the_figures_of_each_kind_of_numbers():
    found = [
        tuple(vars(row).values()) for row in rows_of({"a.w": 100, "b.w": 300}, ["float32", "float16", "int8", "int4"])
    ]
    assert found == [
        ("float32", 1200, 1600, 6400),
        ("float16", 600, 800, 3200),
        ("int8", 300, 400, None),
        ("int4", 150, 200, None),
    ]
    assert vars(rows_of({}, ["int4"])[0]) == {
        "dtype": "int4", "largest_layer_bytes": 0, "total_bytes": 0, "training_bytes": None
    }  # fmt: skip


def test_the_table_has_a_title_and_lines(capsys, tmp_path):
    assert create_ascii_table(["a", "bb"], [["1", "22"], ["333", "4"]], "name").splitlines() == [
        "┌──────┐",
        "│ name │",
        "├───┬──┤",
        "│ a │bb│",
        "├───┼──┤",
        "│ 1 │22│",
        "│333│4 │",
        "└───┴──┘",
    ]
    for title in ("x", "a title that is longer than all columns together"):
        lines = create_ascii_table(["a", "bb"], [["1", "22"]], title).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert title in lines[1]

    save_file(tensors(), tmp_path / "model.safetensors")
    main([str(tmp_path), "--dtypes", "float16", "int8"])
    printed = capsys.readouterr().out
    assert f"Memory usage for loading `{tmp_path}`" in printed
    assert [line.replace(" ", "") for line in printed.splitlines()[3:]] == [
        "│dtype│LargestLayer│TotalSize│TrainingusingAdam│",
        printed.splitlines()[4],
        "│float16│220bytes│502bytes│1.96KB│",
        "│int8│110bytes│251bytes│N/A│",
        printed.splitlines()[-1],
    ]


@pytest.mark.parametrize("form", ["one file", "its path", "shards", "pickle", "other name", "bfloat16"])
def test_headers_of_a_folder_tell_all(tmp_path, capsys, form):
    named = tmp_path
    if form == "shards":
        parts = {"model-00001-of-00002.safetensors": ["emb.weight", "layers.0.a"]}
        parts["model-00002-of-00002.safetensors"] = [name for name in TENSORS if name not in list(parts.values())[0]]
        for file, names in parts.items():
            save_file({name: tensors()[name] for name in names}, tmp_path / file)
        place = {name: file for file, names in parts.items() for name in names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    elif form == "pickle":
        torch.save(tensors(), tmp_path / "pytorch_model.bin")
    else:
        file = tmp_path / ("adapter.safetensors" if form == "other name" else "model.safetensors")
        save_file(tensors(torch.bfloat16 if form == "bfloat16" else torch.float32), file)
        named = file if form == "its path" else tmp_path
    (tmp_path / "config.json").write_text("{}")

    assert rows(capsys, named, "--dtypes", "float32") == [FLOAT32]


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "holds no weights"), ({"model.safetensors": b"\xff" * 100}, "is damaged")],
)
def test_a_folder_that_tells_nothing_is_refused(tmp_path, capsys, content, message):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# The Hub --------------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that are needed, for one public model with safetensors."""

    content = b""
    served: list[int] = []

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = self.content[int(first) : int(last) + 1 if last else None]
        if self.path.endswith("/model.safetensors"):
            Hub.served.append(len(part))
        self.answer(part)

    def answer(self, body: bytes) -> None:
        is_there = self.path == "/some/model/resolve/main/model.safetensors"
        self.send_response(200 if is_there else 404)
        if not is_there:
            self.send_header("X-Error-Code", "EntryNotFound" if "/some/model/" in self.path else "RepoNotFound")
            body = b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_of_a_model_on_the_hub_only_the_header_is_fetched(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({**tensors(), "large.w": torch.zeros(1000, 1000)}, file)
    Hub.content = file.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
        }
        code = """
import sys
from accelerate.commands.estimate import main
for name in ("some/model", "some/other"):
    try:
        main([name, "--json", "--dtypes", "float32"])
    except SystemExit as end:
        print(end.code)
assert "torch" not in sys.modules
"""
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
            )
        finally:
            server.shutdown()
            thread.join()

    assert done.returncode == 0, done.stderr
    printed, _, status = done.stdout.rpartition("}\n")
    assert json.loads(printed + "}")["rows"][0]["total_bytes"] == 4_001_004
    assert status == "2\n"
    assert "'some/other' is neither a file or folder here, nor a model on the Hub that you may see." in done.stderr
    assert Hub.served == [100_001]


def refusal(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("what the server said\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(errors.GatedRepoError), "'a/b' needs a permission."),
        (refusal(errors.RepositoryNotFoundError), "nor a model on the Hub that you may see"),
        (errors.HFValidationError("bad"), "nor a name on the Hub"),
        (ConnectionError("no route\nto host"), "the Hugging Face Hub cannot be asked: ConnectionError: no route."),
        (errors.OfflineModeIsEnabled("offline."), "cannot be asked: OfflineModeIsEnabled: offline."),
    ],
)
def test_what_the_hub_or_the_network_refuses_is_said(monkeypatch, capsys, error, message):
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    with pytest.raises(SystemExit) as end:
        main(["a/b"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("library", "built"), [("timm", "timm"), ("transformers", "transformers"), ("keras", None)])
def test_without_safetensors_the_library_on_the_hub_decides(monkeypatch, capsys, library, built):
    class Info:
        library_name = library

    def refuse(name: str) -> None:
        raise errors.NotASafetensorsRepoError("none")

    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name: Info)
    monkeypatch.setattr(estimate, "_built", lambda name, by, **_: calls.append((name, by)) or {"a.w": 1})
    if built is None:
        with pytest.raises(SystemExit):
            main(["a/b"])
        assert "has no safetensors, and its library is 'keras'." in capsys.readouterr().err
    else:
        assert rows(capsys, "a/b", "--dtypes", "float32")[0]["total_bytes"] == 4
        assert calls == [("a/b", built)]


# Models that are built ------------------------------------------------------------------------------------------------

TIMM = """
import sys
if "broken" in sys.argv[1]:
    raise RuntimeError("no such model")
import torch
assert sys.modules["accelerate"] is None
import importlib.util
assert importlib.util.find_spec("to_fsdp2") is None, "modules beside ours must not be found by their short names"
print("a library may print")
def create_model(name, pretrained):
    assert not pretrained
    model = torch.nn.Sequential(torch.nn.Linear(100_000, 1_000_000), torch.nn.Linear(3, 4))
    model.again = model[1]
    assert model[0].weight.device.type == "meta"
    return model
"""


def test_timm_builds_a_model_without_memory_and_without_us(tmp_path, monkeypatch, capsys):
    (tmp_path / "timm-1.0.dist-info").mkdir()
    (tmp_path / "timm-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 1.0\n")
    (tmp_path / "timm.py").write_text(TIMM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    is_installed.cache_clear()
    try:
        found = rows(capsys, "resnet50", "--library_name", "timm", "--dtypes", "float32")
        with pytest.raises(SystemExit):
            main(["broken", "--library-name", "timm"])
    finally:
        is_installed.cache_clear()

    assert found[0]["total_bytes"] == 4 * (100_000 * 1_000_000 + 1_000_000 + 16)
    assert "timm cannot build 'broken': RuntimeError: no such model" in capsys.readouterr().err


def test_transformers_builds_a_model_from_a_folder_with_a_configuration(tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs the package transformers")
    config = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50, "max_position_embeddings": 10,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    (found,) = rows(capsys, tmp_path, "--dtypes", "float32")

    layer = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8) + 2 * 16
    embeddings = 50 * 8 + 10 * 8 + 2 * 8 + 16
    head = 8 * 8 + 8 + 16 + 50
    buffers = found["total_bytes"] // 4 - (2 * layer + embeddings + head)
    assert found["largest_layer_bytes"] == 4 * layer
    assert 0 <= buffers <= 10, "the projection shares the embeddings, and is counted once"


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("accelerate.core.available.is_installed", lambda *_: False)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    assert (
        "needs the package 'transformers', which is not installed.\nRun: pip install transformers"
        in capsys.readouterr().err
    )


def test_the_program_that_builds_models_imports_nothing_of_ours():
    text = Path(estimate.__file__).with_name("skeleton.py").read_text()
    assert "from ." not in text and "import accelerate" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_the_table_is_drawn_with_what_the_output_has(monkeypatch, encoding):
    table = create_ascii_table(["a", "bb"], [["1", "22"], ["333", "4"]], "name")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    drawn = estimate._drawable(table)

    assert len(drawn) == len(table)
    assert drawn.encode(encoding).decode(encoding) == drawn
    assert (drawn == table) is (encoding == "utf-8")
