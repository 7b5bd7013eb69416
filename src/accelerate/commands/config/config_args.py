"""Where the configuration file lies, under the names clients import.

The paths are resolved once, when this module is imported.
"""

from __future__ import annotations

from ...settings import env
from ...settings.config_file import BaseConfig, ClusterConfig, SageMakerConfig, cache_folder, load_config_from_file

_folder = cache_folder(env.read())

hf_cache_home = str(_folder.parent)
cache_dir = str(_folder)
default_yaml_config_file = str(_folder / "default_config.yaml")
default_json_config_file = default_yaml_config_file
default_config_file = default_yaml_config_file

__all__ = [
    "BaseConfig",
    "ClusterConfig",
    "SageMakerConfig",
    "cache_dir",
    "default_config_file",
    "default_json_config_file",
    "default_yaml_config_file",
    "hf_cache_home",
    "load_config_from_file",
]
