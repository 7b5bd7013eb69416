"""The flags of `accelerate launch` that need an engine of its own, one row each.

Owns names, types and defaults of the flags whose engine is still to come. They are read, so that clients find them in
the namespace; to give one is an error that names the engine. When an engine arrives its rows lose the mark.
"""

from __future__ import annotations

from typing import Any

from ..core.engines import DEEPSPEED, FP8, FSDP, MEGATRON, MESH, SAGEMAKER, TPU, XLA
from .option import Option


def _row(engine: str, name: str, help_text: str, kind: type = str, default: Any = None, **more: Any) -> Option:
    return Option(name, help_text, kind, default, engine=engine, **more)


PARADIGMS = (
    _row(FSDP, "use_fsdp", "Shard models over the processes with FSDP.", bool, False),
    _row(DEEPSPEED, "use_deepspeed", "Train with DeepSpeed.", bool, False),
    _row(MEGATRON, "use_megatron_lm", "Train with Megatron-LM.", bool, False),
    _row(MESH, "use_parallelism_config", "Lay the processes out in several axes.", bool, False),
)

TPUS = (
    _row(TPU, "tpu", "Run on TPUs.", bool, False),
    _row(TPU, "tpu_use_cluster", "Run on all workers of a TPU pod.", bool, False, flag="--tpu_cluster"),
    _row(TPU, "tpu_use_cluster", "Run on one TPU machine.", bool, True, flag="--no_tpu_cluster", const=False),
    _row(TPU, "tpu_use_sudo", "Run the commands on the pod with sudo.", bool, False),
    _row(TPU, "vm", "A worker of the pod; may be given several times.", append=True, shown="NAME"),
    _row(TPU, "env", "A variable for the workers of the pod, NAME=VALUE; may be given several times.", append=True),
    _row(TPU, "main_training_function", "The function of the script that every process runs.", shown="NAME"),
    _row(XLA, "downcast_bf16", "Turn doubles into bf16 as well.", bool, False),
)

DEEPSPEED_FLAGS = (
    _row(DEEPSPEED, "deepspeed_config_file", "DeepSpeed's own configuration file.", shown="FILE"),
    _row(DEEPSPEED, "zero_stage", "Stage of ZeRO, 0 to 3.", int),
    _row(DEEPSPEED, "offload_optimizer_device", "Where the optimizer's state rests: none, cpu or nvme.", shown="NAME"),
    _row(DEEPSPEED, "offload_param_device", "Where parameters rest: none, cpu or nvme.", shown="NAME"),
    _row(DEEPSPEED, "offload_optimizer_nvme_path", "Folder for the optimizer's state.", shown="FOLDER"),
    _row(DEEPSPEED, "offload_param_nvme_path", "Folder for parameters.", shown="FOLDER"),
    _row(DEEPSPEED, "gradient_clipping", "Largest norm of the gradients.", float),
    _row(DEEPSPEED, "zero3_init_flag", "Make models in shards from the start.", shown="BOOL"),
    _row(DEEPSPEED, "zero3_save_16bit_model", "Save gathered 16-bit weights.", shown="BOOL"),
    _row(DEEPSPEED, "deepspeed_moe_layer_cls_names", "Classes of mixture-of-experts layers.", shown="NAMES"),
)

FSDP_FLAGS = (
    _row(FSDP, "fsdp_version", "Version of FSDP.", default="1", choices=("1", "2"), shown="N"),
    _row(FSDP, "fsdp_offload_params", "Keep shards in the memory of the CPU.", default="false", shown="BOOL"),
    _row(FSDP, "fsdp_min_num_params", "Least parameters of a block that is sharded alone.", int, 100_000_000),
    _row(FSDP, "fsdp_sharding_strategy", "What is sharded; of version 1.", default="FULL_SHARD", shown="NAME"),
    _row(FSDP, "fsdp_reshard_after_forward", "Free gathered weights between forward and backward.", default="true",
         shown="BOOL"),
    _row(FSDP, "fsdp_auto_wrap_policy", "How blocks are found.", shown="NAME"),
    _row(FSDP, "fsdp_transformer_layer_cls_to_wrap", "Classes of the blocks.", shown="NAMES"),
    _row(FSDP, "fsdp_backward_prefetch", "When the next block is gathered in backward.", shown="NAME"),
    _row(FSDP, "fsdp_state_dict_type", "Form of checkpoints.", shown="NAME"),
    _row(FSDP, "fsdp_forward_prefetch", "Gather the next block early in forward.", default="false", shown="BOOL"),
    _row(FSDP, "fsdp_use_orig_params", "Show the original parameters to the optimizer.", default="true", shown="BOOL"),
    _row(FSDP, "fsdp_cpu_ram_efficient_loading", "Load weights on the first process only.", default="true",
         shown="BOOL"),
    _row(FSDP, "fsdp_sync_module_states", "Send the first process's weights to all.", default="true", shown="BOOL"),
    _row(FSDP, "fsdp_activation_checkpointing", "Compute activations again in backward.", default="false",
         shown="BOOL"),
    _row(FSDP, "fsdp_activation_checkpointing_offload", "Keep what is needed for that in the memory of the CPU.",
         default="false", shown="BOOL"),
)  # fmt: skip

MEGATRON_FLAGS = (
    _row(MEGATRON, "megatron_lm_tp_degree", "Degree of tensor parallelism.", int, 1),
    _row(MEGATRON, "megatron_lm_pp_degree", "Degree of pipeline parallelism.", int, 1),
    _row(MEGATRON, "megatron_lm_num_micro_batches", "Micro-batches of a pipeline.", int),
    _row(MEGATRON, "megatron_lm_sequence_parallelism", "Shard along the sequence.", shown="BOOL"),
    _row(MEGATRON, "megatron_lm_recompute_activations", "Compute activations again.", shown="BOOL"),
    _row(MEGATRON, "megatron_lm_use_distributed_optimizer", "Shard the optimizer.", shown="BOOL"),
    _row(MEGATRON, "megatron_lm_gradient_clipping", "Largest norm of the gradients.", float, 1.0),
    _row(MEGATRON, "megatron_lm_recompute_granularity", "How much is computed again.", shown="NAME"),
    _row(MEGATRON, "megatron_lm_recompute_method", "Which layers are.", shown="NAME"),
    _row(MEGATRON, "megatron_lm_recompute_num_layers", "How many layers are.", int),
    _row(MEGATRON, "megatron_lm_attention_backend", "Kernel of attention.", shown="NAME"),
    _row(MEGATRON, "megatron_lm_expert_model_parallel_size", "Degree of expert parallelism.", int),
    _row(MEGATRON, "megatron_lm_expert_tensor_parallel_size", "Degree of tensor parallelism in experts.", int),
    _row(MEGATRON, "megatron_lm_context_parallel_size", "Degree of context parallelism.", int),
    _row(MEGATRON, "megatron_lm_attention_dropout", "Dropout of attention.", float),
    _row(MEGATRON, "megatron_lm_hidden_dropout", "Dropout of hidden states.", float),
    _row(MEGATRON, "megatron_lm_attention_softmax_in_fp32", "Attention's softmax in fp32.", shown="BOOL"),
    _row(MEGATRON, "megatron_lm_calculate_per_token_loss", "A loss per token.", shown="BOOL"),
    _row(MEGATRON, "megatron_lm_use_rotary_position_embeddings", "Rotary embeddings.", shown="BOOL"),
    _row(MEGATRON, "megatron_lm_use_custom_fsdp", "Megatron's own FSDP.", default=False, shown="BOOL"),
    _row(MEGATRON, "megatron_lm_no_load_optim", "Load no optimizer.", default=False, shown="BOOL"),
    _row(MEGATRON, "megatron_lm_no_save_optim", "Save no optimizer.", default=False, shown="BOOL"),
    _row(MEGATRON, "megatron_lm_eod_mask_loss", "No loss at ends of documents.", default=False, shown="BOOL"),
    _row(MEGATRON, "megatron_lm_optimizer_cpu_offload", "Optimizer on the CPU.", default=False, shown="BOOL"),
    _row(MEGATRON, "megatron_lm_overlap_cpu_optimizer_d2h_h2d", "Copies beside it.", default=False, shown="BOOL"),
    _row(MEGATRON, "megatron_lm_use_precision_aware_optimizer", "Optimizer states in few bits.", default=False,
         shown="BOOL"),
    _row(MEGATRON, "megatron_lm_decoder_last_pipeline_num_layers", "Layers of the last stage.", int),
)  # fmt: skip

FP8_FLAGS = (
    _row(FP8, "fp8_backend", "Library for fp8.", choices=("ao", "te", "msamp"), shown="NAME"),
    _row(FP8, "fp8_use_autocast_during_eval", "fp8 in evaluation too.", bool, False),
    _row(FP8, "fp8_margin", "Margin of the scale.", int, 0),
    _row(FP8, "fp8_interval", "Steps between two scales.", int, 1),
    _row(FP8, "fp8_format", "Format.", default="HYBRID", choices=("HYBRID", "E4M3", "E5M2"), shown="NAME"),
    _row(FP8, "fp8_amax_history_len", "Steps that a scale looks back.", int, 1024),
    _row(FP8, "fp8_amax_compute_algo", "How it is found.", default="most_recent", choices=("max", "most_recent"),
         shown="NAME"),
    _row(FP8, "fp8_override_linear_precision", "fprop, dgrad and wgrad in higher precision.",
         default=(False, False, False), shown="BOOLS"),
    _row(FP8, "fp8_opt_level", "Level of MS-AMP.", default="O2", choices=("O1", "O2"), shown="NAME"),
    _row(FP8, "fp8_enable_fsdp_float8_all_gather", "Gather shards in fp8.", default="true", shown="BOOL"),
    _row(FP8, "fp8_pad_inner_dim", "Pad matrices to sizes that fp8 takes.", default="true", shown="BOOL"),
)  # fmt: skip

MESH_FLAGS = (
    _row(MESH, "parallelism_config_dp_replicate_size", "Replicas of the model.", int, 1),
    _row(MESH, "parallelism_config_dp_shard_size", "Processes that share one replica.", int, 1),
    _row(MESH, "parallelism_config_tp_size", "Degree of tensor parallelism.", int, 1),
    _row(MESH, "parallelism_config_cp_size", "Degree of context parallelism.", int, 1),
    _row(MESH, "parallelism_config_cp_backend", "Who does it.", default="torch", choices=("torch",), shown="NAME"),
    _row(MESH, "parallelism_config_cp_comm_strategy", "allgather or alltoall.", default="allgather", shown="NAME"),
    _row(MESH, "parallelism_config_sp_size", "Degree of sequence parallelism.", int, 1),
    _row(MESH, "parallelism_config_sp_backend", "Who does it.", default="deepspeed", choices=("deepspeed",),
         shown="NAME"),
    _row(MESH, "parallelism_config_sp_seq_length", "Length of sequences.", shown="N"),
    _row(MESH, "parallelism_config_sp_seq_length_is_variable", "Lengths differ.", default=True, shown="BOOL"),
    _row(MESH, "parallelism_config_sp_attn_implementation", "Attention to use.", default="sdpa", shown="NAME"),
)  # fmt: skip

OTHERS = (
    _row(SAGEMAKER, "aws_access_key_id", "Key of the account that starts the job.", shown="KEY"),
    _row(SAGEMAKER, "aws_secret_access_key", "Its secret.", shown="KEY"),
)

ENGINE_GROUPS = {
    f"{title} (not in this version)": rows
    for title, rows in {
        "engines": PARADIGMS,
        "TPU": TPUS,
        "DeepSpeed": DEEPSPEED_FLAGS,
        "FSDP": FSDP_FLAGS,
        "Megatron-LM": MEGATRON_FLAGS,
        "fp8": FP8_FLAGS,
        "several axes": MESH_FLAGS,
        "SageMaker": OTHERS,
    }.items()
}
