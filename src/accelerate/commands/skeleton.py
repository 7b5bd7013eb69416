"""A program of its own: build a model without its weights, and print what tensors it has.

Owns transformers and timm, and reads nothing but configurations. It runs in an interpreter of its own, because those
libraries import this one and expect names that a version may not have, and because a model may bring code with it.
Imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any


def main() -> None:
    """Read a request from the first argument, and print the number of elements of each tensor as one line of JSON."""
    request = json.loads(sys.argv[1])
    sys.modules["accelerate"] = None  # pyright: ignore[reportArgumentType]  # "not installed", for whoever asks
    build = {"transformers": _from_transformers, "timm": _from_timm}[request["library"]]
    model = build(request["model"], request["trust_remote_code"])
    print(json.dumps(dict(_tensors(model))))


def _from_transformers(name: str, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        for architecture in getattr(config, "architectures", None) or []:
            known = getattr(transformers, architecture, None)
            if known is not None:
                return known(config)
        return transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)


def _from_timm(name: str, _trust_remote_code: bool) -> Any:
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def _tensors(model: Any) -> Iterator[tuple[str, int]]:
    """Yield every tensor that a checkpoint would hold, once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(tensor, "numel") and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.numel()


if __name__ == "__main__":
    main()
