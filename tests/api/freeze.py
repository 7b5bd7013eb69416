"""Write `frozen_api.json`: the documented and used public names of the peer that this version has.

    python tests/api/freeze.py path/to/public_api.json

The specification lists, for each module of Accelerate 1.15, its public names with signature and a tier: A is
documented, B is used by a known client, C is the rest. Frozen are all names of tier A and B, with the members of
their classes of these tiers (of `Accelerator` all members), and where they are re-exported: from `accelerate` and
`accelerate.utils` all, from elsewhere those that are documented or used there. A name that belongs to an engine this version does not have must stand in `WAITING`, so nothing is lost
silently: a name is frozen or waiting.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).with_name("frozen_api.json")

# Module, or one name of a module -> the engine it waits for.
WAITING = {
    "accelerate.big_modeling": "offload",
    "accelerate.hooks": "offload",
    "accelerate.utils.offload": "offload",
    "accelerate.utils.modeling": "offload",
    "accelerate.inference": "pipeline parallelism",
    "accelerate.parallelism_config": "device meshes",
    "accelerate.tracking": "trackers",
    "accelerate.utils.ao": "fp8",
    "accelerate.utils.transformer_engine": "fp8",
    "accelerate.utils.bnb": "quantisation",
    "accelerate.utils.deepspeed": "DeepSpeed",
    "accelerate.utils.fsdp_utils": "FSDP",
    "accelerate.utils.megatron_lm": "Megatron-LM",
    "accelerate.utils.torch_xla": "XLA",
    "accelerate.utils.constants.FSDP_AUTO_WRAP_POLICY": "FSDP",
    "accelerate.utils.constants.FSDP_SHARDING_STRATEGY": "FSDP",
    "accelerate.utils.dataclasses.AORecipeKwargs": "fp8",
    "accelerate.utils.dataclasses.BnbQuantizationConfig": "quantisation",
    "accelerate.utils.dataclasses.DeepSpeedPlugin": "DeepSpeed",
    "accelerate.utils.dataclasses.FP8RecipeKwargs": "fp8",
    "accelerate.utils.dataclasses.FullyShardedDataParallelPlugin": "FSDP",
    "accelerate.utils.dataclasses.MegatronLMPlugin": "Megatron-LM",
    "accelerate.utils.dataclasses.TERecipeKwargs": "fp8",
    "accelerate.utils.dataclasses.get_module_class_from_name": "FSDP",
    "accelerate.utils.environment.check_cuda_p2p_ib_support": "a table of cards without peer-to-peer copies",
    "accelerate.utils.other.get_module_children_bottom_up": "FSDP",
    "accelerate.accelerator.Accelerator._prepare_cp": "context parallelism",
    "accelerate.accelerator.Accelerator._prepare_fsdp2": "FSDP",
    "accelerate.state.AcceleratorState.fsdp_plugin": "FSDP",
    "accelerate.state.AcceleratorState.megatron_lm_plugin": "Megatron-LM",
    "accelerate.accelerator.Accelerator.deepspeed_config": "DeepSpeed",
    "accelerate.state.AcceleratorState.downcast_bfloat": "XLA",
}

# Names that are here although their module waits.
HERE = {
    "accelerate.utils.fsdp_utils.merge_fsdp_weights",
    "accelerate.utils.modeling.convert_file_size_to_int",
    "accelerate.utils.modeling.get_grad_scaler",
    "accelerate.utils.modeling.get_mixed_precision_context_manager",
    "accelerate.utils.modeling.load_checkpoint_in_model",
    "accelerate.utils.modeling.load_state_dict",
}

ALL_MEMBERS = {"accelerate.accelerator.Accelerator"}
REEXPORTING = ("accelerate", "accelerate.utils")
TIERS = ("A", "B")


CACHE = "<cache>/"


def portable(text: str) -> str:
    """Return the printed form of a value without the home folder of whoever printed it."""
    return re.sub(r"'[^']*/accelerate/(?=default_config)", f"'{CACHE}", text)


def engine_of(name: str) -> str | None:
    """Return the engine a full name waits for; `None` if it is here."""
    if name in HERE:
        return None
    return WAITING.get(name) or WAITING.get(name.rpartition(".")[0])


def freeze(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the frozen names, re-exports and waiting names of a specification."""
    definitions: dict[str, Any] = {}
    waiting: dict[str, str] = {}
    for module, content in spec["modules"].items():
        for short, described in content.get("defines", {}).items():
            name = f"{module}.{short}"
            if described["tier"] not in TIERS:
                continue
            engine = engine_of(name)
            if engine is not None:
                waiting[name] = engine
            else:
                definitions[name] = _definition(name, described, waiting)
    reexports = {}
    for module, content in spec["modules"].items():
        for short, text in content.get("reexports", {}).items():
            target, _, tier = text.partition("|")
            if target in definitions and (tier in TIERS or module in REEXPORTING):
                reexports[f"{module}.{short}"] = target
    return {
        "peer": spec["accelerate_version"],
        "definitions": dict(sorted(definitions.items())),
        "reexports": dict(sorted(reexports.items())),
        "waiting": dict(sorted(waiting.items())),
    }


def _definition(name: str, described: dict[str, Any], waiting: dict[str, str]) -> dict[str, Any]:
    kind = described["k"]
    found: dict[str, Any] = {"kind": kind}
    if kind == "enum":
        return {**found, "members": described["members"]}
    if kind == "constant":
        return {**found, "value": portable(described["v"])}
    if "s" in described:
        found["signature"] = portable(described["s"])
    if "init" in described:
        found["signature"] = portable(described["init"])
    if "fields" in described:
        found["fields"] = {field: default for field, (_, default) in described["fields"].items()}
    members = {}
    for member, details in described.get("members", {}).items():
        if details["t"] not in TIERS and name not in ALL_MEMBERS:
            continue
        if engine := WAITING.get(f"{name}.{member}"):
            waiting[f"{name}.{member}"] = engine
            continue
        members[member] = {"kind": details["k"], **({"signature": details["s"]} if "s" in details else {})}
    if members:
        found["members"] = members
    attributes = []
    for attribute in described.get("instance_attributes", []):
        if engine := WAITING.get(f"{name}.{attribute}"):
            waiting[f"{name}.{attribute}"] = engine
        else:
            attributes.append(attribute)
    if attributes:
        found["attributes"] = attributes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="public_api.json of the peer")
    spec = json.loads(parser.parse_args().spec.read_text())
    FROZEN.write_text(json.dumps(freeze(spec), indent=1) + "\n")


if __name__ == "__main__":
    main()
