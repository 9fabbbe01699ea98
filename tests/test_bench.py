"""The benchmarks' arithmetic, report and pictures. Nothing here is measured, and no time is asserted."""

import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import aims, effects, report, steady, under_load
from tests.bench.copying import watch
from tests.bench.load import Job, Requests
from tests.bench.plot import Bar, draw
from tests.bench.results import Part, Spread, load, number, ratios, save, spread
from tests.bench.stage import must_be_equal, parse_extents

CASE = "random 4 KiB reads, depth 16, O_DIRECT"


def part_of(**rounds: list[float | None]) -> Part:
    """A part of steady state with one case."""
    part = Part("steady", machine="a machine", rounds=3)
    for who, values in rounds.items():
        for value in values:
            part.add(CASE, {"ours": steady.PLAIN, "theirs": steady.QEMU}[who], value)
    return part


# Ratios


def test_a_ratio_is_that_of_a_round() -> None:
    assert ratios([10, 200, 3], [5, 100, 6]) == [2, 2, 0.5]


def test_a_round_that_was_thrown_away_takes_its_partner_with_it() -> None:
    part = part_of(ours=[10, None, 30], theirs=[5, 1, 10])
    assert part.ratios(CASE, steady.PLAIN, steady.QEMU) == [2, 3]
    assert part.values(CASE, steady.QEMU) == [5, 1, 10]


def test_who_was_not_measured_has_no_ratio() -> None:
    part = part_of(ours=[10, 20, 30])
    assert part.ratios(CASE, steady.PLAIN, steady.QEMU) == []
    assert spread(part.ratios("no case", steady.PLAIN, steady.QEMU)) == ""


def test_a_spread_is_the_median_the_least_and_the_greatest() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
    assert spread([0.5, 12.34, 1234.5]) == "12.3 (0.50–1,234)"
    assert [number(value) for value in (12345.6, 0.1, 0.0424)] == ["12,346", "0.10", "0.042"]


def test_results_are_kept_part_by_part(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    assert load(file) == {}
    old, other = Part("sync", rounds=1), part_of(ours=[1, None])
    save(file, old)
    save(file, other)
    new = Part("sync", rounds=5, notes=["it rained"])
    save(file, new)
    assert load(file) == {"sync": new, "steady": other}
    assert list(file.parent.iterdir()) == [file]


# Aims


def outcome_of(part: Part, text: str) -> aims.Outcome:
    """Of the aim that begins so."""
    return next(each for each in aims.outcomes({part.name: part}) if each.aim.text.startswith(text))


@pytest.mark.parametrize(("ours", "reached"), [(200.0, True), (199.0, False)])
def test_an_aim_is_reached_by_the_median_of_the_ratios(ours: float, reached: bool) -> None:
    part = part_of(ours=[ours, 10, 900], theirs=[100, 100, 100])
    outcome = outcome_of(part, "4 KiB reads, depth 16")
    assert outcome.reached is reached
    assert outcome.measured == Spread(ours / 100, 0.1, 9)
    assert ("| yes |" if reached else "| **no** |") in aims.aims_table({"steady": part})


def test_the_worst_case_counts_and_is_named() -> None:
    part = part_of(ours=[400], theirs=[100])
    loop = CASE.replace("O_DIRECT", "loop")
    part.add(loop, steady.PLAIN, 150)
    part.add(loop, steady.QEMU, 100)
    outcome = outcome_of(part, "4 KiB reads, depth 16")
    assert (outcome.measured.median, outcome.worst, outcome.reached) == (1.5, loop, False)


def test_a_mean_is_one_of_ratios_and_its_worst_case_is_told() -> None:
    part = Part("steady")
    for case, split in ((steady.CELLS[0].case, 50.0), (steady.CELLS[1].case, 200.0)):
        part.add(case, steady.PLAIN, 100)
        part.add(case, steady.SPLIT, split)
    outcome = outcome_of(part, "a Source with a fractured clone")
    assert outcome.measured.median == pytest.approx(1)
    assert outcome.worst == f"{steady.CELLS[0].case}: 0.50 (0.50–0.50)"


def test_less_is_better_where_the_aim_says_at_most() -> None:
    part = Part("restore")
    for job, sweep in zip(aims.READS, (10.0, 20.0), strict=True):
        case = under_load.load_case(job, under_load.P99)
        part.add(case, aims.OURS, sweep)
        part.add(case, aims.THEIRS, 100)
    outcome = outcome_of(part, f"{aims.BESIDE_SWEEP}, against the qcow2 overlay: p99")
    assert (outcome.measured.median, outcome.reached) == (0.2, True)
    assert outcome.aim.margin(0.1) == pytest.approx(2)


def test_every_aim_looks_where_something_is_measured() -> None:
    names = {aim.part for aim in aims.AIMS}
    assert names <= set(report.REPORTS)
    cells = {cell.case for cell in steady.CELLS}
    for aim in aims.AIMS:
        found = aim.cases(Part(aim.part))
        assert found, aim.text
        if aim.part == "steady" and "first writes" not in aim.text:
            assert {name for name, _ in found} <= cells


# The page


def test_a_section_of_the_page_is_replaced_and_nothing_else() -> None:
    page = (
        "a\n<!-- steady -->\nold\n<!-- end of steady -->\nb\n<!-- sync -->\n<!-- end of sync -->\n"
    )
    once = report.replaced(page, "steady", "new")
    assert once == page.replace("\nold\n", "\n\nnew\n\n")
    assert report.replaced(once, "steady", "new") == once
    with pytest.raises(ValueError, match="growth"):
        report.replaced(page, "growth", "new")


def test_the_page_has_a_place_for_every_section(tmp_path: Path) -> None:
    page = (report.DOCS / report.PAGE).read_text()
    (tmp_path / report.PAGE).write_text(page)
    report.record({"steady": part_of(ours=[10, 20, 30], theirs=[10, 10, 10])}, tmp_path)
    recorded = (tmp_path / report.PAGE).read_text()
    assert "2.00 (1.00–3.00)" in recorded
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "performance-aims.svg",
        "performance-steady.svg",
    }
    for name in ("aims", *report.REPORTS):
        page = report.replaced(page, name, "")
    for picture in tmp_path.glob("*.svg"):
        assert f"({picture.name})" in page


# Pictures


def test_the_picture_of_aims_shows_how_many_times_as_good_as_needed() -> None:
    part = Part("restore")
    for value in (0.005, 0.04, 0.01):
        part.add(effects.effect("1 TiB", effects.ALL), effects.SECONDS, value)
    (outcome,) = aims.outcomes({"restore": part})
    bar = report.aim_bar(outcome)
    assert bar.ratio == Spread(2, 0.5, 4)
    assert bar.text == "10.0 ms (at most 20 ms)"


def numbers_of(svg: str, name: str, *attributes: str) -> list[list[float]]:
    """What the elements of a class have, in order."""
    return [
        [float(element.attrib[attribute]) for attribute in attributes]
        for element in ElementTree.fromstring(svg).iter()
        if name in element.get("class", "").split()
    ]


def test_bars_go_from_the_line_at_one_and_twice_is_as_long_as_half() -> None:
    bars = [Bar("a < b", Spread(2, 1.5, 3), "2×"), Bar("c", Spread(0.5, 0.4, 0.6), "½")]
    svg = draw('"title" & more', "times", bars)
    ((one, _),) = numbers_of(svg, "one", "x1", "x2")
    ((at, beyond),) = numbers_of(svg, "beyond", "x", "width")
    (short_at, short), *_ = numbers_of(
        svg.replace("<circle", "<circle x='0' width='0'"), "short", "x", "width"
    )
    assert at == pytest.approx(one)
    assert short_at + short == pytest.approx(one, abs=0.2)
    assert beyond == pytest.approx(short, abs=0.2)
    spreads = numbers_of(svg, "spread", "x1", "x2")
    assert spreads[0][0] < at + beyond < spreads[0][1]
    assert "a &lt; b" in svg


@pytest.mark.parametrize("ratio", [0.001, 1.0, 5000.0])
def test_a_bar_never_leaves_the_picture(ratio: float) -> None:
    svg = draw("t", "x", [Bar("b", Spread(ratio, ratio / 2, ratio * 2), "")])
    width = float(ElementTree.fromstring(svg).attrib["width"])
    for line in numbers_of(svg, "spread", "x1", "x2"):
        assert all(0 <= x <= width for x in line)


# What is counted while something copies


def test_hosts_count_only_within_the_copy() -> None:
    lines = [f"{1000 + number}, {1000 * number}, 0, 4096, 0, 0" for number in range(400)]
    found = Requests("\n".join(lines) + "\n")
    got = found.within(1.1, 1.3)
    assert got is not None
    assert got.requests == 200
    assert got.iops == pytest.approx(1000)
    assert got.p50 == pytest.approx(199.5e-6)
    assert found.within(1.1, 1.15) is None


def test_a_copy_is_last_seen_before_the_look_that_finds_it_over() -> None:
    looks: list[float] = []

    def copies() -> bool:
        looks.append(time.time())
        return len(looks) < 4

    copying = watch(lambda: None, copies, pause=0)
    assert copying.asked <= copying.begun <= copying.last_seen <= looks[2] <= copying.over
    assert copying.last_seen - copying.begun < under_load.SHORTEST


def test_a_job_of_depth_16_is_16_programs_if_it_is_buffered() -> None:
    words = Job("write", "1m", 16, direct=False).words(1 << 24)
    assert {"--ioengine=psync", "--numjobs=16", "--direct=0"} <= set(words)
    assert {f"--size={1 << 20}", f"--offset_increment={1 << 20}"} <= set(words)
    words = Job("randread", "4k", 16).words(1 << 24)
    assert {"--ioengine=libaio", "--iodepth=16", "--direct=1", f"--size={1 << 24}"} <= set(words)


# What is looked at besides


def test_a_copy_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(5 * 65536))
    wrong = bytearray(one.read_bytes())
    wrong[2 * 65536 + 7] = 1
    other.write_bytes(wrong)
    with pytest.raises(AssertionError, match="differ at byte 131072"):
        must_be_equal(one, other)
    must_be_equal(one, other, but=parse_extents("0,2-3\n"))
    must_be_equal(one, other, stop=2 * 65536)


def test_a_list_of_extents_is_read() -> None:
    assert parse_extents("\n") == []
    assert parse_extents("0,4-7,9\n") == [range(1), range(4, 8), range(9, 10)]
