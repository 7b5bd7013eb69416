"""A process group that somebody else has made before us."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from .process import Process
from .variables import number


def find(environ: Mapping[str, str]) -> Process | None:
    """Return the place in the existing group, if there is one."""
    # Whoever made a group has imported torch; a launcher that asks who it is need not.
    if "torch" not in sys.modules:
        return None
    from .connect import existing_group

    group = existing_group()
    if group is None:
        return None
    rank, world_size = group
    return Process(
        rank=rank,
        world_size=world_size,
        local_rank=number(environ, "LOCAL_RANK", rank),
        local_world_size=number(environ, "LOCAL_WORLD_SIZE", world_size),
        source="attached",
    )
