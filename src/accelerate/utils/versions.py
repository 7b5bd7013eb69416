"""Face of `accelerate.utils.versions`. The code lives in `accelerate.core.versions`."""

from ..core.versions import compare_versions, is_torch_version

__all__ = ["compare_versions", "is_torch_version"]
