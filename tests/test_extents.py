"""Geometry, maps and sizes."""

import random

import pytest

from clonefs.errors import ClonefsError
from clonefs.extents import ExtentMap, Geometry, extent_list, format_size, parse_size


def test_the_last_extent_may_be_short() -> None:
    geometry = Geometry(10 * 4096 + 512, 4096)
    assert geometry.extents == 11
    assert geometry.bytes_of(10, 11) == (40960, 512)
    assert geometry.extents_of(40959, 2) == (9, 11)
    assert geometry.whole_extents_of(40960, 512) == (10, 11)
    assert geometry.whole_extents_of(40960, 511) == (10, 10)
    assert geometry.whole_extents_of(1, 8192) == (1, 2)


@pytest.mark.parametrize(
    ("size", "extent_size"),
    [
        (0, 4096),
        (513, 4096),
        (-512, 4096),
        (4096, 2048),
        (4096, 8 << 20),
        (4096, 5000),
        ((16 << 40) + 512, 65536),
    ],
)
def test_impossible_geometries_are_refused(size: int, extent_size: int) -> None:
    with pytest.raises(ClonefsError):
        Geometry(size, extent_size)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("64K", 65536), ("64k", 65536), ("10G", 10 << 30), ("16T", 16 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "1 G", "64KB", "1P", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ClonefsError):
        parse_size(text)


def test_a_map_against_a_set() -> None:
    rng = random.Random(1)
    extents = ExtentMap.empty(150)
    other = ExtentMap.empty(150)
    model: set[int] = set()
    other_model: set[int] = set()
    for _ in range(3000):
        first = rng.randrange(150)
        stop = min(150, first + rng.choice((1, 1, 2, 7, 40)))
        if rng.random() < 0.5:
            extents.mark(first, stop)
            model |= set(range(first, stop))
        else:
            extents.clear(first, stop)
            model -= set(range(first, stop))
        other.mark(first, first + 1)
        other_model.add(first)
        assert extents.count == len(model)
        assert extents.count_common(other) == len(model & other_model)
        assert extents.next_set(first, 150) == min((e for e in model if e >= first), default=-1)
        assert extents.next_clear(first, stop) == min(
            (e for e in range(first, stop) if e not in model), default=stop
        )
    assert {e for run in extents.runs() for e in range(*run)} == model
    frozen = extents.snapshot()
    extents.mark_from(other)
    assert extents.count == len(model | other_model)
    assert frozen.count == len(model)


def test_extent_lists_are_cpulists() -> None:
    extents = ExtentMap.empty(10)
    assert extent_list(extents) == ""
    extents.mark(0, 1)
    extents.mark(4, 8)
    extents.mark(9, 10)
    assert extent_list(extents) == "0,4-7,9"
