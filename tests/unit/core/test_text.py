from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelerate.core.errors import SettingError
from accelerate.core.text import convert_bytes, convert_file_size_to_int, str_to_bool


@pytest.mark.parametrize("word", ["y", "yes", "t", "true", "on", "1", "Yes", "ON", "True"])
def test_words_for_true(word):
    assert str_to_bool(word) == 1
    assert str_to_bool(word, to_bool=True) is True


@pytest.mark.parametrize("word", ["n", "no", "f", "false", "off", "0", "No", "FALSE"])
def test_words_for_false(word):
    assert str_to_bool(word) == 0
    assert str_to_bool(word, to_bool=True) is False


@pytest.mark.parametrize("word", ["maybe", "", "2", " yes"])
def test_other_words_are_refused_with_what_is_accepted(word):
    with pytest.raises(SettingError, match="is not a boolean") as caught:
        str_to_bool(word)
    assert repr(word) in str(caught.value)
    assert "Accepted: 'y', 'yes'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1KB", 1000), ("1MB", 10**6), ("10GB", 10**10), ("2TB", 2 * 10**12),
        ("1KiB", 1024), ("1MiB", 2**20), ("5GiB", 5 * 2**30), ("1TiB", 2**40),
        ("1.5GB", 1_500_000_000), ("0.5 MiB", 2**19), ("100", 100), (77, 77), ("8b", 8), ("8B", 8),
        ("8Gb", 10**9), ("8Mb", 10**6), ("5gb", 5 * 10**9), ("5mib", 5 * 2**20), ("8Gib", 2**30),
    ],
)  # fmt: skip
def test_sizes_in_bytes(text, count):
    assert convert_file_size_to_int(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1 2GB", "ten"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SettingError, match="is not a size in bytes") as caught:
        convert_file_size_to_int(text)
    assert "GiB" in str(caught.value)
    assert "'10GB'" in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KB"),
        (2**20, "1.0 MB"),
        (3 * 2**30, "3.0 GB"),
        (2**50, "1024.0 TB"),
    ],
)
def test_sizes_are_printed_with_the_unit_that_suits(count, text):
    assert convert_bytes(count) == text


@given(st.integers(0, 2**50), st.sampled_from(["KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]))
def test_a_size_is_its_count_times_its_unit(count, unit):
    assert convert_file_size_to_int(f"{count}{unit}") == int(float(count) * convert_file_size_to_int(f"1{unit}"))
    assert convert_file_size_to_int(str(count)) == count


@given(st.integers(-(2**45), 2**45))
@example(1048571)
def test_a_printed_size_is_short_and_close(count):
    number, unit = convert_bytes(count).split()
    power = ("bytes", "KB", "MB", "GB", "TB").index(unit)
    assert abs(float(number)) < 1024 or unit == "TB"
    assert abs(float(number) * 1024**power - count) <= 0.005 * 1024**power + 1e-6
