"""The types of the keys of a configuration file, and the keys of its nested sections. Tables; no code that acts."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.enums import DynamoBackend, PrecisionType

DYNAMO_KEYS = (
    "dynamo_backend",
    "dynamo_mode",
    "dynamo_use_fullgraph",
    "dynamo_use_dynamic",
    "dynamo_use_regional_compilation",
)
"""What `dynamo_config` may hold; the prefix may be left out."""

LEGACY_KEYS = ("fp16", "dynamo_backend")
"""Keys of old files that are translated while reading."""

CHOICES: dict[str, tuple[str, ...]] = {
    "mixed_precision": tuple(PrecisionType.list()),
    "dynamo_backend": tuple(name.lower() for name in DynamoBackend.list()),
    "dynamo_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
"""Setting -> the words that it may be, as a flag, as a variable and in a file."""

RETIRED = {
    "ipex_config": "torch has what Intel's extension for it brought",
    "mpirun_config.mpirun_ccl": "processes of mpirun talk through gloo or nccl",
}
"""Keys of old files that say nothing any more -> why. They are read, told and left out."""

KINDS: dict[str, tuple[str, ...]] = {
    "bool": (
        "use_cpu", "debug", "same_network", "enable_cpu_affinity", "downcast_bf16", "tpu_use_cluster", "tpu_use_sudo",
    ),
    "int": ("num_processes", "machine_rank", "num_machines", "main_process_port"),
    "section": (
        "fp8_config", "deepspeed_config", "fsdp_config", "parallelism_config", "megatron_lm_config", "mpirun_config",
        "dynamo_config", "additional_args",
    ),
    "list": ("commands", "tpu_vm", "tpu_env"),
}  # fmt: skip
"""Type -> the keys that have it. All others are text."""

WORDS = {"bool": "true or false", "int": "an integer", "number": "a number", "section": "nested keys", "list": "a list"}
"""Type -> what it is called in a message; otherwise it is text."""

EXAMPLES = {"gpu_ids": "`all`, or numbers such as 0,1"}
"""Key -> what it may be, where `text` does not say enough."""


def kind_of(key: str) -> str:
    """Return the type of a key of the top level."""
    return next((name for name, keys in KINDS.items() if key in keys), "text")


# --- nested sections ---------------------------------------------------------------------------------------

_FSDP = {
    "version": "int", "reshard_after_forward": "text", "offload_params": "bool", "auto_wrap_policy": "text",
    "transformer_layer_cls_to_wrap": "text", "min_num_params": "int", "backward_prefetch": "text",
    "state_dict_type": "text", "forward_prefetch": "bool", "use_orig_params": "bool",
    "cpu_ram_efficient_loading": "bool", "sync_module_states": "bool", "activation_checkpointing": "bool",
    "sharding_strategy": "text", "ignored_modules": "text", "activation_checkpointing_offload": "bool",
}  # fmt: skip

_DEEPSPEED = {
    "deepspeed_config_file": "text", "zero_stage": "int", "offload_optimizer_device": "text",
    "offload_param_device": "text", "offload_param_nvme_path": "text", "offload_optimizer_nvme_path": "text",
    "gradient_accumulation_steps": "int or auto", "gradient_clipping": "number or auto",
    "zero3_save_16bit_model": "bool", "zero3_init_flag": "bool", "deepspeed_moe_layer_cls_names": "text",
    "deepspeed_multinode_launcher": "text", "deepspeed_hostfile": "text", "deepspeed_exclusion_filter": "text",
    "deepspeed_inclusion_filter": "text",
}  # fmt: skip

_PARALLELISM = {
    "dp_replicate_size": "int", "dp_shard_size": "int", "tp_size": "int", "cp_size": "int", "cp_backend": "text",
    "cp_comm_strategy": "text", "sp_size": "int", "sp_backend": "text", "sp_seq_length": "int",
    "sp_seq_length_is_variable": "bool", "sp_attn_implementation": "text",
}  # fmt: skip

_MEGATRON = {
    "tp_degree": "int", "pp_degree": "int", "num_micro_batches": "int", "sequence_parallelism": "bool",
    "recompute_activations": "bool", "use_distributed_optimizer": "bool", "gradient_clipping": "number",
    "use_custom_fsdp": "bool", "no_load_optim": "bool", "eod_mask_loss": "bool",
    "overlap_cpu_optimizer_d2h_h2d": "bool", "no_save_optim": "bool", "optimizer_cpu_offload": "bool",
    "use_precision_aware_optimizer": "bool", "decoder_last_pipeline_num_layers": "int",
    "recompute_granularity": "text", "recompute_method": "text", "recompute_num_layers": "int",
    "attention_backend": "text", "expert_model_parallel_size": "int", "context_parallel_size": "int",
    "attention_dropout": "number", "hidden_dropout": "number", "attention_softmax_in_fp32": "bool",
    "expert_tensor_parallel_size": "int", "calculate_per_token_loss": "bool",
    "use_rotary_position_embeddings": "bool",
}  # fmt: skip

_FP8 = {
    "backend": "text", "use_autocast_during_eval": "bool", "margin": "int", "interval": "int", "format": "text",
    "amax_history_len": "int", "amax_history_length": "int", "amax_compute_algo": "text",
    "amax_compute_algorithm": "text", "override_linear_precision": "anything", "opt_level": "text",
    "optimization_level": "text", "enable_fsdp_float8_all_gather": "bool", "pad_inner_dim": "bool",
}  # fmt: skip

_DYNAMO = {
    "backend": "text", "mode": "text", "use_fullgraph": "bool", "use_dynamic": "bool",
    "use_regional_compilation": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """The keys of a nested section."""

    keys: dict[str, str]
    """Full name -> type."""
    prefix: str = ""
    """What a key may leave out."""

    def full_name(self, key: str) -> str:
        """Return the name of the flag that a key stands for."""
        return key if not self.prefix or key.startswith(self.prefix) else f"{self.prefix}{key}"


def _prefixed(prefix: str, keys: dict[str, str], *, may_be_left_out: bool) -> Section:
    return Section({f"{prefix}{name}": kind for name, kind in keys.items()}, prefix if may_be_left_out else "")


SECTIONS = {
    "fsdp_config": _prefixed("fsdp_", _FSDP, may_be_left_out=True),
    "deepspeed_config": Section(_DEEPSPEED),
    "parallelism_config": _prefixed("parallelism_config_", _PARALLELISM, may_be_left_out=False),
    "megatron_lm_config": _prefixed("megatron_lm_", _MEGATRON, may_be_left_out=False),
    "fp8_config": _prefixed("fp8_", _FP8, may_be_left_out=True),
    "dynamo_config": _prefixed("dynamo_", _DYNAMO, may_be_left_out=True),
    "mpirun_config": Section({"mpirun_hostfile": "text"}),
}
"""Section -> what it may hold."""
