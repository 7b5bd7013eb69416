"""Which optional packages are here.

Owns one probe per package, by its distribution and import name; importing none of them. Names and answers are
public: clients ask `is_wandb_available()` and friends.
"""

from __future__ import annotations

import functools
import importlib.util

from .errors import MissingPackage, explain


@functools.cache
def is_installed(module: str, distribution: str | None = None) -> bool:
    """Tell whether `module` can be imported and belongs to an installed distribution.

    A folder named like a package (`wandb/` beside the script) is importable but not installed, hence the
    second question.
    """
    try:
        if importlib.util.find_spec(module) is None:
            return False
    except ValueError:  # something stands in for the module, as in tests, and has no specification
        return False
    from importlib.metadata import PackageNotFoundError, version  # costs 10 ms that most launches do not need

    try:
        version(distribution or module)
    except PackageNotFoundError:
        return False
    return True


def require(module: str, *, setting: str, install: str, distribution: str | None = None) -> None:
    """Raise `MissingPackage` unless the package is here.

    Args:
        module: Import name.
        setting: What needs it, as the user wrote it: `"use_stateful_dataloader=True"`.
        install: What to install, as pip is told: `"torchdata"`.
        distribution: Distribution name, when it is not the import name.
    """
    if not is_installed(module, distribution):
        raise MissingPackage(
            explain(
                f"{setting} needs the package {module!r}, which is not installed.",
                remedy=f"Run: pip install {install}",
            )
        )


def is_tqdm_available() -> bool:
    return is_installed("tqdm")


def is_rich_available() -> bool:
    return is_installed("rich")


def is_datasets_available() -> bool:
    return is_installed("datasets")


def is_transformers_available() -> bool:
    return is_installed("transformers")


def is_peft_available() -> bool:
    return is_installed("peft")


def is_timm_available() -> bool:
    return is_installed("timm")


def is_deepspeed_available() -> bool:
    return is_installed("deepspeed")


def is_boto3_available() -> bool:
    return is_installed("boto3")


def is_sagemaker_available() -> bool:
    return is_installed("sagemaker")


def is_wandb_available() -> bool:
    return is_installed("wandb")


def is_tensorboard_available() -> bool:
    return is_installed("tensorboard") or is_installed("tensorboardX")


def is_mlflow_available() -> bool:
    return is_installed("mlflow") or is_installed("mlflow", "mlflow-skinny")


def is_comet_ml_available() -> bool:
    return is_installed("comet_ml")


def is_aim_available() -> bool:
    return is_installed("aim")


def is_clearml_available() -> bool:
    return is_installed("clearml")


def is_dvclive_available() -> bool:
    return is_installed("dvclive")


def is_swanlab_available() -> bool:
    return is_installed("swanlab")


def is_trackio_available() -> bool:
    return is_installed("trackio")


def is_pandas_available() -> bool:
    return is_installed("pandas")


def is_matplotlib_available() -> bool:
    return is_installed("matplotlib")


def is_bnb_available() -> bool:
    return is_installed("bitsandbytes")


def is_torchao_available() -> bool:
    return is_installed("torchao")


def is_transformer_engine_available() -> bool:
    return is_installed("transformer_engine")


def is_msamp_available() -> bool:
    return is_installed("msamp", "ms-amp")


def is_lomo_available() -> bool:
    return is_installed("lomo_optim", "lomo-optim")


def is_schedulefree_available() -> bool:
    return is_installed("schedulefree")


def is_megatron_lm_available() -> bool:
    return is_installed("megatron", "megatron-core")


def is_torchdata_available() -> bool:
    return is_installed("torchdata")


def is_torchdata_stateful_dataloader_available() -> bool:
    return is_installed("torchdata")


def is_fp8_available() -> bool:
    """Tell whether any library for eight-bit training is here."""
    return is_transformer_engine_available() or is_torchao_available() or is_msamp_available()
