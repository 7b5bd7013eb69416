"""Make broken files out of good ones, with an eye for what they mean.

Every input follows from its number and the seed alone, so a failure is repeated by its number.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

TEXTS = [
    "", ".", "..", "../victim", "/victim", "/etc/passwd", "a/../../victim", "a\0b", "link", "link/victim", "x" * 300,
    "x" * 5000, "\x1b[2J", "\u202e", "\ud800", "💥" * 100, "model.safetensors", "optimizer.json", "checkpoint_1", "$type",
    "__metadata__", "O", "<f8", "V1000000000", "|O8", "<U999999999", "<M8[s]", "float32", "load", "_dynamo", "cuda:99",
    "F32", "F64", "BF16", "U8", "F4", "tensor", "array", "scalar", "torch", "dict", "sequence", "int", "0" * 16, "ff" * 8,
    "-0x1", "9" * 5000, "accelerate_manifest.json", "C:\\x", "..\\x", "nul", " ", "\n", "\\", '"', "{", "NaN",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 4, 7, 8, 12, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1,
    2**64, 2**70, -(2**63), -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None,
]  # fmt: skip
NODES: list[dict[str, Any]] = [
    {"$type": "int", "hex": "0x10"},
    {"$type": "float", "bits": "7ff0000000000000"},
    {"$type": "complex", "bits": "00" * 16},
    {"$type": "str", "hex": "eda080"},
    {"$type": "bytes", "hex": "00ff"},
    {"$type": "sequence", "kind": "tuple", "items": [1, 2]},
    {"$type": "sequence", "kind": "set", "items": [1, 2]},
    {"$type": "sequence", "kind": "deque", "items": [1, 2], "maxlen": 1},
    {"$type": "dict", "items": [[1, 2], ["a", []]]},
    {"$type": "dict", "items": [[1, 2]], "kind": "Counter"},
    {"$type": "dict", "items": [], "kind": "defaultdict", "factory": "list"},
    {"$type": "tensor", "name": "x"},
    {"$type": "tensor", "name": "y", "stride": [1, 2]},
    {"$type": "tensor", "name": "x", "bytes_of": "complex128", "shape": [1]},
    {"$type": "tensor", "name": "x", "requires_grad": True, "parameter": True},
    {"$type": "array", "name": "y", "dtype": "|u1", "shape": [4]},
    {"$type": "scalar", "dtype": "<f8", "hex": "00" * 8},
    {"$type": "torch", "kind": "dtype", "value": "float32"},
    {"$type": "torch", "kind": "device", "value": "cpu"},
    {"$type": "torch", "kind": "size", "value": [1, 2]},
]
PARTS = [
    b"(", b"0", b"1", b"2", b".", b"N", b"\x88", b")", b"]", b"}", b"\x8f", b"\x85", b"\x86", b"\x87", b"t", b"e", b"a", b"u",
    b"s", b"R", b"\x81", b"b", b"\x94", b"Q", b"\x93", b"\x92", b"q\0", b"h\0", b"h\1", b"h\2", b"h\7", b"K\0", b"K\1",
    b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255,
    b"X\xff\xff\xff\xff", b"X\3\0\0\0fqn", b"X\3\0\0\0hex", b"X\2\0\0\0..", b"X\7\0\0\0storage", b"U\3hex", b"G" + b"\xff" * 8,
    b"X\x07\0\0\0/victim", b"X\x09\0\0\0../victim", b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n",
    b"c__builtin__\nset\n", b"c_codecs\nencode\n", b"ctorch\nSize\n", b"ctorch\nfloat32\n", b"ctorch\nfloat64\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n", b"ctorch\nFloatTensor\n", b"ctorch\nTensor\n", b"cnumpy\nndarray\n",
    b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cpathlib\nPath\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"ctorch._utils\n_rebuild_parameter\n",
]  # fmt: skip
TOKENS = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\u0000", b"\\", b"null", b"1e999", b"NaN", b"\xff", b"\0", b"-"]


def mutated(good: Sequence[bytes], draw: random.Random) -> bytes:
    """Return one of the good texts, changed in its meaning, its spelling or both."""
    text = draw.choice(good)
    kind = draw.random()
    if kind < 0.75:
        try:
            tree = json.loads(text)
        except ValueError:
            kind = 1.0
        else:
            for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
                tree = _changed(tree, draw)
            text = _spelled(tree, draw)
    if kind > 0.6:
        text = changed_bytes(text, good, draw)
    return text


def _spelled(tree: Any, draw: random.Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, None, 1)))
    return text.encode("utf-8", "surrogatepass")


def _changed(tree: Any, draw: random.Random, depth: int = 0) -> Any:
    """Change one place of a tree."""
    inner = isinstance(tree, (dict, list)) and tree
    if inner and depth < 12 and draw.random() < 0.8:
        if isinstance(tree, dict):
            key = draw.choice(list(tree))
            return {**tree, key: _changed(tree[key], draw, depth + 1)} if draw.random() < 0.9 else _keys(tree, draw)
        place = draw.randrange(len(tree))
        return [*tree[:place], _changed(tree[place], draw, depth + 1), *tree[place + 1 :]]
    if inner and draw.random() < 0.5:
        return _keys(tree, draw)
    return _value(tree, draw)


def _keys(tree: Any, draw: random.Random) -> Any:
    """Take out, add or exchange members."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    action = draw.randrange(4)
    place = draw.randrange(len(items))
    if action == 0:
        del items[place]
    elif action == 1:
        items.insert(place, (draw.choice(TEXTS), draw.choice(items)[1]))
    elif action == 2:
        items[place] = (items[place][0], draw.choice(items)[1])
    else:
        items[place] = (draw.choice(TEXTS), items[place][1])
    return dict(items) if isinstance(tree, dict) else [value for _, value in items]


def _value(old: Any, draw: random.Random) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: draw.choice(TEXTS),
        lambda: draw.choice(NUMBERS),
        lambda: dict(draw.choice(NODES)),
        lambda: [draw.choice(NUMBERS) for _ in range(draw.randrange(4))],
        lambda: {draw.choice(TEXTS): draw.choice(NUMBERS)},
        lambda: _deep(old, draw),
        # Copies of copies of a hundred would be gigabytes, and test the memory of this machine.
        lambda: [old] * (draw.choice((2, 3)) if isinstance(old, list | dict) else 100),
        lambda: (
            old[: draw.randrange(len(old) + 1)] + draw.choice(TEXTS) if isinstance(old, str) else draw.choice(TEXTS)
        ),
        lambda: old + draw.choice((-1, 1, 2**32)) if isinstance(old, int) else draw.choice(NUMBERS),
    ]
    return draw.choice(makers)()


def _deep(inner: Any, draw: random.Random) -> Any:
    for _ in range(draw.choice((1, 5, 50, 200))):
        inner = [inner] if draw.random() < 0.5 else {"$type": "sequence", "kind": "tuple", "items": [inner]}
    return inner


def changed_bytes(text: bytes, good: Sequence[bytes], draw: random.Random) -> bytes:
    """Change a text without looking at what it means."""
    content = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(content) + 1)
        action = draw.randrange(7)
        if action == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif action == 1:
            del content[place:]
        elif action == 2:
            del content[place : place + draw.randrange(1, 20)]
        elif action == 3:
            content[place:place] = draw.choice(TOKENS) * draw.choice((1, 1, 2, 1000))
        elif action == 4:
            other = draw.choice(good)
            begin = draw.randrange(len(other) + 1)
            content[place:] = other[begin:]
        elif action == 5:
            begin = draw.randrange(len(content) + 1)
            content[place:place] = content[begin : begin + 50]
        else:
            content[place : place + 1] = bytes([draw.randrange(256)])
    return bytes(content)


def instructions(content: bytes) -> list[bytes]:
    """Cut a pickle into its instructions, without the frames, whose lengths would not fit any more."""
    found = [(code.name, place or 0) for code, _, place in pickletools.genops(content)]
    ends = [place for _, place in found[1:]] + [len(content)]
    return [content[place:end] for (name, place), end in zip(found, ends, strict=True) if name != "FRAME"]


def mutated_pickle(good: Sequence[list[bytes]], draw: random.Random) -> bytes:
    """Return one of the good pickles with a few instructions changed, and all others as they were."""
    if draw.random() < 0.05:
        return b"\x80\x02" + b"".join(draw.choice(PARTS) for _ in range(draw.randrange(1, 40))) + b"."
    parts = list(draw.choice(good))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        place, other = draw.randrange(len(parts)), draw.randrange(len(parts))
        action = draw.randrange(8)
        if action == 0:
            del parts[place : place + draw.choice((1, 1, 2, 10))]
            parts = parts or [b"."]
        elif action == 1:
            parts.insert(place, draw.choice(PARTS))
        elif action == 2:
            parts[place] = draw.choice(PARTS)
        elif action == 3:
            parts[place] = parts[other]
        elif action == 4:
            parts[place], parts[other] = parts[other], parts[place]
        elif action == 5:
            parts[place:place] = parts[other : other + draw.randrange(1, 30)]
        elif action == 6:
            parts[place:place] = [draw.choice(PARTS)] * draw.choice((1, 2, 1000))
        else:
            parts[place] = changed_bytes(parts[place], [parts[other]], draw)
    return b"".join(parts)


def archived(entries: Sequence[tuple[str, bytes]], draw: random.Random) -> bytes:
    """Put entries into an archive; some of them under another name, twice, packed or in part."""
    entries = list(entries)
    if draw.random() < 0.2:
        place = draw.randrange(len(entries))
        name, content = entries[place]
        entries[place : place + 1] = draw.choice(
            [
                [],
                [(name, content)] * 2,
                [(name.upper(), content)],
                [(draw.choice(entries)[0], content)],
                [(name, content[: draw.randrange(len(content) + 1)])],
                [(name, content * 2)],
                [("archive/data.pkl", content)],
            ]
        )
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if draw.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as target:
        for name, content in entries:
            target.writestr(zipfile.ZipInfo(name), content, kind)
    return stream.getvalue()
