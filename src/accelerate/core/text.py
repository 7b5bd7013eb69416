"""Read and print booleans and sizes in bytes.

Imports no torch.
"""

from __future__ import annotations

import re

from .errors import SettingError, explain

_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")

_UNITS = {
    "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "TIB": 2**40,
    "TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1,
}  # fmt: skip


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Read a boolean word in any letter case.

    Args:
        value: One of y, yes, t, true, on, 1 and n, no, f, false, off, 0.
        to_bool: Return `True`/`False` in place of 1/0.

    Raises:
        SettingError: (a `ValueError`) for any other word.
    """
    word = value.lower()
    if word not in _TRUE + _FALSE:
        raise SettingError(explain(f"{value!r} is not a boolean.", accepted=_TRUE + _FALSE))
    truth = word in _TRUE
    return truth if to_bool else int(truth)


def convert_file_size_to_int(size: int | str) -> int:
    """Convert a size such as `"10GB"`, `"512MiB"` or a number into bytes.

    Units are decimal (`KB`, `MB`, `GB`, `TB`) or binary (`KiB`, `MiB`, `GiB`, `TiB`). A lower-case final
    `b` means bits, as in `"8Gb"`.

    Raises:
        SettingError: (a `ValueError`) if the text is not a size.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)?\s*", str(size))
    unit = (match.group(2) or "B") if match else ""
    if match is None or unit.upper() not in _UNITS:
        raise SettingError(
            explain(
                f"size={size!r} is not a size in bytes.",
                accepted="an integer, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB",
                remedy="For example '10GB'.",
            )
        )
    count = float(match.group(1)) * _UNITS[unit.upper()]
    is_bits = unit.endswith("b") and len(unit) > 1 and unit[:-1] != unit[:-1].lower()
    return int(count / 8) if is_bits else int(count)


def convert_bytes(size: float) -> str:
    """Print a number of bytes with the unit that suits it: `"1.5 KB"` (units of 1024)."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if abs(round(size, 2)) < 1024 or unit == "TB":  # rounded, or 1048571 were "1024.0 KB"
            break
        size /= 1024
    return f"{round(size, 2)} {unit}"


def is_host(text: str) -> bool:
    """Tell whether a text can be an address or the name of a host."""
    return text[:1] not in ("", "-") and all(sign.isascii() and (sign.isalnum() or sign in ".-:_%[]") for sign in text)
