"""Face of `accelerate.utils`: the historical names, each resolved on first use from the file it lives in."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy_names

# At once, because it shares its name with the module it is imported from: loaded later, the module would take the
# function's place.
from .tqdm import tqdm

_HOMES = {
    "AORecipeKwargs": "settings.options.absent",
    "AutocastKwargs": "settings.options.handlers",
    "BaseEnum": "core.enums",
    "ComputeEnvironment": "core.enums",
    "ConvertOutputsToFp32": "precision.autocast",
    "CustomDtype": "core.enums",
    "DDPCommunicationHookType": "core.enums",
    "DataLoaderConfiguration": "settings.options.data",
    "DeepSpeedPlugin": "settings.options.absent",
    "DistributedDataParallelKwargs": "settings.options.handlers",
    "DistributedOperationException": "core.errors",
    "DistributedType": "core.enums",
    "DynamoBackend": "core.enums",
    "FP8BackendType": "core.enums",
    "FP8RecipeKwargs": "settings.options.absent",
    "FullyShardedDataParallelPlugin": "settings.options.absent",
    "GradScalerKwargs": "settings.options.handlers",
    "GradientAccumulationPlugin": "settings.options.accumulation",
    "InitProcessGroupKwargs": "settings.options.handlers",
    "KwargsHandler": "settings.bag",
    "LoggerType": "core.enums",
    "MODEL_NAME": "checkpoint.layout",
    "MSAMPRecipeKwargs": "settings.options.absent",
    "MegatronLMPlugin": "settings.options.absent",
    "OPTIMIZER_NAME": "checkpoint.layout",
    "ParallelismConfig": "settings.options.absent",
    "PrecisionType": "core.enums",
    "ProfileKwargs": "settings.options.handlers",
    "Preempted": "core.leaving",
    "ProjectConfiguration": "settings.options.project",
    "RNGType": "core.enums",
    "RNG_STATE_NAME": "checkpoint.layout",
    "SAFE_MODEL_NAME": "checkpoint.layout",
    "SAFE_WEIGHTS_INDEX_NAME": "checkpoint.layout",
    "SAFE_WEIGHTS_NAME": "checkpoint.layout",
    "SAFE_WEIGHTS_PATTERN_NAME": "checkpoint.layout",
    "SAMPLER_NAME": "checkpoint.layout",
    "SCALER_NAME": "checkpoint.layout",
    "SCHEDULER_NAME": "checkpoint.layout",
    "SageMakerDistributedType": "core.enums",
    "TERecipeKwargs": "settings.options.absent",
    "TorchDynamoPlugin": "settings.options.compile",
    "TorchTensorParallelPlugin": "settings.options.absent",
    "WEIGHTS_INDEX_NAME": "checkpoint.layout",
    "WEIGHTS_NAME": "checkpoint.layout",
    "WEIGHTS_PATTERN_NAME": "checkpoint.layout",
    "broadcast": "runtime.ops",
    "broadcast_object_list": "runtime.ops",
    "clear_device_cache": "runtime.memory",
    "clear_environment": "settings.env",
    "compare_versions": "core.versions",
    "concatenate": "runtime.ops",
    "convert_bytes": "core.text",
    "convert_file_size_to_int": "core.text",
    "convert_outputs_to_fp32": "precision.autocast",
    "convert_to_fp32": "runtime.ops",
    "extract_model_from_parallel": "parallel.unwrap",
    "find_batch_size": "runtime.ops",
    "find_device": "runtime.ops",
    "find_executable_batch_size": "runtime.memory",
    "gather": "runtime.ops",
    "gather_object": "runtime.ops",
    "get_grad_scaler": "session.region",
    "get_int_from_env": "settings.env",
    "get_mixed_precision_context_manager": "session.region",
    "has_compiled_regions": "parallel.unwrap",
    "honor_type": "core.tree",
    "ignorant_find_batch_size": "runtime.ops",
    "is_aim_available": "core.available",
    "is_bf16_available": "hardware",
    "is_bnb_available": "core.available",
    "is_boto3_available": "core.available",
    "is_clearml_available": "core.available",
    "is_comet_ml_available": "core.available",
    "is_compiled_module": "parallel.unwrap",
    "is_cuda_available": "hardware",
    "is_datasets_available": "core.available",
    "is_deepspeed_available": "core.available",
    "is_dvclive_available": "core.available",
    "is_fp16_available": "hardware",
    "is_fp8_available": "core.available",
    "is_hpu_available": "hardware",
    "is_lomo_available": "core.available",
    "is_matplotlib_available": "core.available",
    "is_megatron_lm_available": "core.available",
    "is_mlflow_available": "core.available",
    "is_mlu_available": "hardware",
    "is_mps_available": "hardware",
    "is_msamp_available": "core.available",
    "is_musa_available": "hardware",
    "is_namedtuple": "core.tree",
    "is_neuron_available": "hardware",
    "is_npu_available": "hardware",
    "is_pandas_available": "core.available",
    "is_peft_available": "core.available",
    "is_rich_available": "core.available",
    "is_sagemaker_available": "core.available",
    "is_schedulefree_available": "core.available",
    "is_sdaa_available": "hardware",
    "is_swanlab_available": "core.available",
    "is_tensorboard_available": "core.available",
    "is_timm_available": "core.available",
    "is_torch_tensor": "runtime.ops",
    "is_torch_version": "core.versions",
    "is_torch_xla_available": "hardware",
    "is_torchao_available": "core.available",
    "is_torchdata_available": "core.available",
    "is_torchdata_stateful_dataloader_available": "core.available",
    "is_tqdm_available": "core.available",
    "is_trackio_available": "core.available",
    "is_transformer_engine_available": "core.available",
    "is_transformers_available": "core.available",
    "is_wandb_available": "core.available",
    "is_xpu_available": "hardware",
    "listify": "runtime.ops",
    "load": "checkpoint.weights",
    "load_checkpoint_in_model": "session.in_model",
    "load_state_dict": "session.in_model",
    "merge_fsdp_weights": "checkpoint.convert",
    "override_numa_affinity": "hardware.affinity",
    "pad_across_processes": "runtime.ops",
    "pad_input_tensors": "runtime.ops",
    "parse_choice_from_env": "settings.env",
    "parse_flag_from_env": "settings.env",
    "patch_environment": "settings.env",
    "purge_accelerate_environment": "settings.env",
    "recursively_apply": "runtime.ops",
    "reduce": "runtime.ops",
    "release_memory": "runtime.memory",
    "save": "checkpoint.weights",
    "send_to_device": "runtime.ops",
    "set_numa_affinity": "hardware.affinity",
    "set_seed": "runtime.rng",
    "should_reduce_batch_size": "runtime.memory",
    "slice_tensors": "runtime.ops",
    "str_to_bool": "core.text",
    "synchronize_rng_state": "runtime.rng",
    "synchronize_rng_states": "runtime.rng",
    "wait_for_everyone": "runtime.ops",
    "write_basic_config": "commands.config.default",
}

_MODULES = (
    "constants",
    "dataclasses",
    "environment",
    "fsdp_utils",
    "imports",
    "memory",
    "modeling",
    "operations",
    "other",
    "random",
    "versions",
)

if TYPE_CHECKING:
    from ..checkpoint.convert import merge_fsdp_weights as merge_fsdp_weights
    from ..checkpoint.layout import MODEL_NAME as MODEL_NAME
    from ..checkpoint.layout import OPTIMIZER_NAME as OPTIMIZER_NAME
    from ..checkpoint.layout import RNG_STATE_NAME as RNG_STATE_NAME
    from ..checkpoint.layout import SAFE_MODEL_NAME as SAFE_MODEL_NAME
    from ..checkpoint.layout import SAFE_WEIGHTS_INDEX_NAME as SAFE_WEIGHTS_INDEX_NAME
    from ..checkpoint.layout import SAFE_WEIGHTS_NAME as SAFE_WEIGHTS_NAME
    from ..checkpoint.layout import (
        SAFE_WEIGHTS_PATTERN_NAME as SAFE_WEIGHTS_PATTERN_NAME,
    )
    from ..checkpoint.layout import SAMPLER_NAME as SAMPLER_NAME
    from ..checkpoint.layout import SCALER_NAME as SCALER_NAME
    from ..checkpoint.layout import SCHEDULER_NAME as SCHEDULER_NAME
    from ..checkpoint.layout import WEIGHTS_INDEX_NAME as WEIGHTS_INDEX_NAME
    from ..checkpoint.layout import WEIGHTS_NAME as WEIGHTS_NAME
    from ..checkpoint.layout import WEIGHTS_PATTERN_NAME as WEIGHTS_PATTERN_NAME
    from ..checkpoint.weights import load as load
    from ..checkpoint.weights import save as save
    from ..commands.config.default import write_basic_config as write_basic_config
    from ..core.available import is_aim_available as is_aim_available
    from ..core.available import is_bnb_available as is_bnb_available
    from ..core.available import is_boto3_available as is_boto3_available
    from ..core.available import is_clearml_available as is_clearml_available
    from ..core.available import is_comet_ml_available as is_comet_ml_available
    from ..core.available import is_datasets_available as is_datasets_available
    from ..core.available import is_deepspeed_available as is_deepspeed_available
    from ..core.available import is_dvclive_available as is_dvclive_available
    from ..core.available import is_fp8_available as is_fp8_available
    from ..core.available import is_lomo_available as is_lomo_available
    from ..core.available import is_matplotlib_available as is_matplotlib_available
    from ..core.available import is_megatron_lm_available as is_megatron_lm_available
    from ..core.available import is_mlflow_available as is_mlflow_available
    from ..core.available import is_msamp_available as is_msamp_available
    from ..core.available import is_pandas_available as is_pandas_available
    from ..core.available import is_peft_available as is_peft_available
    from ..core.available import is_rich_available as is_rich_available
    from ..core.available import is_sagemaker_available as is_sagemaker_available
    from ..core.available import is_schedulefree_available as is_schedulefree_available
    from ..core.available import is_swanlab_available as is_swanlab_available
    from ..core.available import is_tensorboard_available as is_tensorboard_available
    from ..core.available import is_timm_available as is_timm_available
    from ..core.available import is_torchao_available as is_torchao_available
    from ..core.available import is_torchdata_available as is_torchdata_available
    from ..core.available import (
        is_torchdata_stateful_dataloader_available as is_torchdata_stateful_dataloader_available,
    )
    from ..core.available import is_tqdm_available as is_tqdm_available
    from ..core.available import is_trackio_available as is_trackio_available
    from ..core.available import (
        is_transformer_engine_available as is_transformer_engine_available,
    )
    from ..core.available import is_transformers_available as is_transformers_available
    from ..core.available import is_wandb_available as is_wandb_available
    from ..core.enums import BaseEnum as BaseEnum
    from ..core.enums import ComputeEnvironment as ComputeEnvironment
    from ..core.enums import CustomDtype as CustomDtype
    from ..core.enums import DDPCommunicationHookType as DDPCommunicationHookType
    from ..core.enums import DistributedType as DistributedType
    from ..core.enums import DynamoBackend as DynamoBackend
    from ..core.enums import FP8BackendType as FP8BackendType
    from ..core.enums import LoggerType as LoggerType
    from ..core.enums import PrecisionType as PrecisionType
    from ..core.enums import RNGType as RNGType
    from ..core.enums import SageMakerDistributedType as SageMakerDistributedType
    from ..core.errors import (
        DistributedOperationException as DistributedOperationException,
    )
    from ..core.leaving import Preempted as Preempted
    from ..core.text import convert_bytes as convert_bytes
    from ..core.text import convert_file_size_to_int as convert_file_size_to_int
    from ..core.text import str_to_bool as str_to_bool
    from ..core.tree import honor_type as honor_type
    from ..core.tree import is_namedtuple as is_namedtuple
    from ..core.versions import compare_versions as compare_versions
    from ..core.versions import is_torch_version as is_torch_version
    from ..hardware import is_bf16_available as is_bf16_available
    from ..hardware import is_cuda_available as is_cuda_available
    from ..hardware import is_fp16_available as is_fp16_available
    from ..hardware import is_hpu_available as is_hpu_available
    from ..hardware import is_mlu_available as is_mlu_available
    from ..hardware import is_mps_available as is_mps_available
    from ..hardware import is_musa_available as is_musa_available
    from ..hardware import is_neuron_available as is_neuron_available
    from ..hardware import is_npu_available as is_npu_available
    from ..hardware import is_sdaa_available as is_sdaa_available
    from ..hardware import is_torch_xla_available as is_torch_xla_available
    from ..hardware import is_xpu_available as is_xpu_available
    from ..hardware.affinity import override_numa_affinity as override_numa_affinity
    from ..hardware.affinity import set_numa_affinity as set_numa_affinity
    from ..parallel.unwrap import (
        extract_model_from_parallel as extract_model_from_parallel,
    )
    from ..parallel.unwrap import has_compiled_regions as has_compiled_regions
    from ..parallel.unwrap import is_compiled_module as is_compiled_module
    from ..precision.autocast import ConvertOutputsToFp32 as ConvertOutputsToFp32
    from ..precision.autocast import convert_outputs_to_fp32 as convert_outputs_to_fp32
    from ..runtime.memory import clear_device_cache as clear_device_cache
    from ..runtime.memory import (
        find_executable_batch_size as find_executable_batch_size,
    )
    from ..runtime.memory import release_memory as release_memory
    from ..runtime.memory import should_reduce_batch_size as should_reduce_batch_size
    from ..runtime.ops import broadcast as broadcast
    from ..runtime.ops import broadcast_object_list as broadcast_object_list
    from ..runtime.ops import concatenate as concatenate
    from ..runtime.ops import convert_to_fp32 as convert_to_fp32
    from ..runtime.ops import find_batch_size as find_batch_size
    from ..runtime.ops import find_device as find_device
    from ..runtime.ops import gather as gather
    from ..runtime.ops import gather_object as gather_object
    from ..runtime.ops import ignorant_find_batch_size as ignorant_find_batch_size
    from ..runtime.ops import is_torch_tensor as is_torch_tensor
    from ..runtime.ops import listify as listify
    from ..runtime.ops import pad_across_processes as pad_across_processes
    from ..runtime.ops import pad_input_tensors as pad_input_tensors
    from ..runtime.ops import recursively_apply as recursively_apply
    from ..runtime.ops import reduce as reduce
    from ..runtime.ops import send_to_device as send_to_device
    from ..runtime.ops import slice_tensors as slice_tensors
    from ..runtime.ops import wait_for_everyone as wait_for_everyone
    from ..runtime.rng import set_seed as set_seed
    from ..runtime.rng import synchronize_rng_state as synchronize_rng_state
    from ..runtime.rng import synchronize_rng_states as synchronize_rng_states
    from ..session.in_model import load_checkpoint_in_model as load_checkpoint_in_model
    from ..session.in_model import load_state_dict as load_state_dict
    from ..session.region import get_grad_scaler as get_grad_scaler
    from ..session.region import (
        get_mixed_precision_context_manager as get_mixed_precision_context_manager,
    )
    from ..settings.bag import KwargsHandler as KwargsHandler
    from ..settings.env import clear_environment as clear_environment
    from ..settings.env import get_int_from_env as get_int_from_env
    from ..settings.env import parse_choice_from_env as parse_choice_from_env
    from ..settings.env import parse_flag_from_env as parse_flag_from_env
    from ..settings.env import patch_environment as patch_environment
    from ..settings.env import (
        purge_accelerate_environment as purge_accelerate_environment,
    )
    from ..settings.options.absent import AORecipeKwargs as AORecipeKwargs
    from ..settings.options.absent import DeepSpeedPlugin as DeepSpeedPlugin
    from ..settings.options.absent import FP8RecipeKwargs as FP8RecipeKwargs
    from ..settings.options.absent import (
        FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin,
    )
    from ..settings.options.absent import MegatronLMPlugin as MegatronLMPlugin
    from ..settings.options.absent import MSAMPRecipeKwargs as MSAMPRecipeKwargs
    from ..settings.options.absent import ParallelismConfig as ParallelismConfig
    from ..settings.options.absent import TERecipeKwargs as TERecipeKwargs
    from ..settings.options.absent import (
        TorchTensorParallelPlugin as TorchTensorParallelPlugin,
    )
    from ..settings.options.accumulation import (
        GradientAccumulationPlugin as GradientAccumulationPlugin,
    )
    from ..settings.options.compile import TorchDynamoPlugin as TorchDynamoPlugin
    from ..settings.options.data import (
        DataLoaderConfiguration as DataLoaderConfiguration,
    )
    from ..settings.options.handlers import AutocastKwargs as AutocastKwargs
    from ..settings.options.handlers import (
        DistributedDataParallelKwargs as DistributedDataParallelKwargs,
    )
    from ..settings.options.handlers import GradScalerKwargs as GradScalerKwargs
    from ..settings.options.handlers import (
        InitProcessGroupKwargs as InitProcessGroupKwargs,
    )
    from ..settings.options.handlers import ProfileKwargs as ProfileKwargs
    from ..settings.options.project import ProjectConfiguration as ProjectConfiguration

__all__ = ["tqdm", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals(), _MODULES)
