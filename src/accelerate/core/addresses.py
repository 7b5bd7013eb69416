"""How addresses such as `s3://bucket/run` are shown: without what nobody else may read."""

from __future__ import annotations

import re
from pathlib import Path

_SECRETS = re.compile(r"(?<=://)[^/\s@]*@|\?.*", re.DOTALL)


def shown(place: Path | str) -> str:
    """Return a folder, or an address without user, password and signature, for messages."""
    text = str(place)
    if "://" not in text:
        return text
    return _SECRETS.sub(lambda found: "?***" if found.group().startswith("?") else "***@", text)


def hidden(text: str, address: str) -> str:
    """Return a text of somebody else's, such as an error's, without what `shown` leaves out of the address."""
    secrets = [found.strip("@?") for found in _SECRETS.findall(address)]
    secrets += [secret.partition(":")[2] for secret in secrets]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text
