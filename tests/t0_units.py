"""Parsing and printing of sizes and page ranges, with what each refuses."""

from __future__ import annotations

import pytest

from xipfs.errors import EXIT_USAGE, UsageError
from xipfs.units import (
    PAGE_MASK,
    PAGE_SIZE,
    format_ns,
    format_size,
    pages_of,
    parse_page_range,
    parse_page_ranges,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1024),
        ("64K", 65536),
        ("256M", 268435456),
        ("256MiB", 268435456),
        ("256 MB", 268435456),
        (" 3G ", 3221225472),
        ("16T", 17592186044416),
        ("1P", 1125899906842624),
        ("512B", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5M", "1e6", "10X", "1 2", "0x10", "1KM"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number of bytes") as refused:
        parse_size(text)
    assert refused.value.exit_code == EXIT_USAGE
    assert repr(text) in refused.value.what


@pytest.mark.parametrize(
    ("text", "pages"),
    [("0", range(1)), ("7", range(7, 8)), ("0-0", range(1)), ("3-15", range(3, 16))],
)
def test_page_ranges(text: str, pages: range) -> None:
    assert parse_page_range(text) == pages


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "not valid"), ("a", "not valid"), ("1-", "not valid"), ("-1", "not valid"),
     ("1-2-3", "not valid"), ("3-2", "runs backwards")],
)  # fmt: skip
def test_what_is_no_page_range(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_page_range(text)


def test_several_ranges() -> None:
    assert parse_page_ranges("0-15,20") == [range(16), range(20, 21)]
    with pytest.raises(UsageError):
        parse_page_ranges("0-15,")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (268435456, "256 MiB"),
        (1 << 40, "1 TiB"),
        (1 << 50, "1 PiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1 us"),
        (5_909, "5.909 us"),
        (-46_500, "-46.5 us"),
        (999_949, "999.9 us"),
        (999_950, "1 ms"),  # not 1000 us
        (340_000_000, "340 ms"),
        (12_345_000_000, "12.35 s"),
        (9_999_600_000_000, "10000 s"),
        (123_456_000_000_000, "123456 s"),
    ],
)
def test_times_for_people(time_ns: int, text: str) -> None:
    assert format_ns(time_ns) == text


def test_pages() -> None:
    assert [pages_of(size) for size in (0, 1, 4095, 4096, 4097)] == [0, 1, 1, 1, 2]
    assert (PAGE_SIZE, PAGE_MASK & 0x12345) == (4096, 0x12000)
