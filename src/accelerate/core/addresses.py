"""How addresses such as `s3://bucket/run` are shown: without what nobody else may read."""

from __future__ import annotations

import re
from pathlib import Path

_SECRETS = re.compile(r"(?<=://)[^/\s@]*@|\?.*", re.DOTALL)


def shown(place: Path | str) -> str:
    """Return a folder or an address for messages: names, passwords and signatures of an address are left out."""
    text = str(place)
    if "://" not in text:
        return text
    return _SECRETS.sub(lambda found: "?***" if found.group().startswith("?") else "***@", text)
