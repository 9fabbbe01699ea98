"""The metrics by themselves: the text as a parser reads it, the page about it, and the dashboard."""

import json
import math
import re
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from clonefs.engines import Tally
from clonefs.engines.counters import GroupCounters, LuCounters
from clonefs.errors import failed
from clonefs.fuse import metrics
from clonefs.fuse.metrics import BUCKETS, GROUPS, MOUNT, Metric
from tests.test_docs import DOCS, bare, cells, page, section, tables

TABLES: tuple[Metric[Any], ...] = (*MOUNT, *GROUPS)
ALL = {metric.name: metric for metric in TABLES}
DASHBOARD = DOCS / "grafana-dashboard.json"


# Counting


def test_a_tally_counts_times_in_powers_of_two() -> None:
    tally = Tally()
    for nanoseconds in (0, 1, 2, 3, 4, 1023, 1024, 10**18):
        tally.done(10, nanoseconds)
    counted = tally.statistics()
    found = {bits: count for bits, count in enumerate(counted.buckets) if count}
    assert found == {0: 1, 1: 1, 2: 2, 3: 1, 10: 1, 11: 1, 60: 1}
    assert (counted.count, counted.bytes, counted.errors) == (8, 80, 0)
    assert counted.seconds == pytest.approx(1e9 + 2.057e-6)


def test_what_fails_is_an_error_and_nothing_else() -> None:
    tally = Tally()
    with tally.timed(512):
        pass
    with pytest.raises(Exception, match="broken"), tally.timed(512):
        raise failed("broken")
    with pytest.raises(KeyboardInterrupt), tally.timed(512):
        raise KeyboardInterrupt
    counted = tally.statistics()
    assert (counted.count, counted.bytes, counted.errors) == (1, 512, 1)


def test_what_was_seen_does_not_change() -> None:
    tally = Tally()
    before = tally.statistics()
    tally.done(1, 1)
    assert before.count == sum(before.buckets) == 0


def test_a_clone_that_comes_again_begins_at_0() -> None:
    counters = GroupCounters()
    counters.lu("nightly").read.done(1, 1)
    counters.clone("nightly").splits += 1
    counters.forget("nightly")
    assert counters.lu("nightly").read.count == counters.clone("nightly").splits == 0
    assert isinstance(counters.lu("never seen"), LuCounters)


# The text


def parsed(text: bytes) -> dict[str, Any]:
    """The families by the names that their samples have in the file."""
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text.decode()):
        suffix = "_total" if family.type == "counter" else ""
        assert family.name + suffix not in found, "the samples of a metric stand together"
        found[family.name + suffix] = family
    return found


def written(metric: Metric[None]) -> bytes:
    """The metric as the file has it."""
    where = metrics._label("mountpoint", "/srv")
    return metrics._piece(metric, where, metric.samples(None), first=True)


def samples(metric: Metric[None]) -> list[Sample]:
    """What a parser reads."""
    return list(parsed(written(metric))[metric.name].samples)


AWKWARD = ('a "quoted" \\ path', "two\nlines", "\\n", "é 復元", "{a=b},", "", "\\")


@pytest.mark.parametrize("label", AWKWARD)
def test_labels_survive(label: str) -> None:
    metric: Metric[None] = Metric(
        "clonefs_x", "gauge", ("path",), lambda _: [((label,), 1)], "Some."
    )
    (sample,) = samples(metric)
    assert sample.labels == {"mountpoint": "/srv", "path": label}


def test_bytes_that_are_no_text_are_replaced() -> None:
    label = b"/srv/\xff.img".decode(errors="surrogateescape")
    metric: Metric[None] = Metric(
        "clonefs_x", "gauge", ("path",), lambda _: [((label,), 1)], "Some."
    )
    assert samples(metric)[0].labels["path"] == "/srv/�.img"


@pytest.mark.parametrize("value", [0, 1, 2**53 + 1, 0.1, 1e-9, 1e22, math.inf])
def test_numbers_survive(value: float) -> None:
    metric: Metric[None] = Metric("clonefs_x", "gauge", (), lambda _: [((), value)], "Some.")
    assert samples(metric)[0].value == value


def test_a_histogram_has_all_that_belongs_to_one() -> None:
    tally = Tally()
    for nanoseconds in (1, 3000, 3000, 10**6, 10**11):
        tally.done(0, nanoseconds)
    metric: Metric[None] = Metric(
        "clonefs_x_seconds", "histogram", ("op",), lambda _: [(("read",), tally.statistics())], "."
    )
    found = samples(metric)
    assert {sample.labels["op"] for sample in found} == {"read"}
    buckets = {
        float(sample.labels["le"]): sample.value for sample in found if "bucket" in sample.name
    }
    assert list(buckets) == [2**bits / 1e9 for bits in BUCKETS] + [math.inf]
    expected = {
        bound: sum(nanoseconds / 1e9 <= bound for nanoseconds in (1, 3000, 3000, 10**6, 10**11))
        for bound in buckets
    }
    assert buckets == expected
    rest = {sample.name: sample.value for sample in found if "bucket" not in sample.name}
    assert rest == {
        "clonefs_x_seconds_sum": pytest.approx(100.001006001),
        "clonefs_x_seconds_count": 5,
    }


def test_a_metric_without_samples_is_not_there() -> None:
    metric: Metric[None] = Metric("clonefs_x", "gauge", (), lambda _: [], "Some.")
    assert written(metric) == b""


def test_names_are_as_prometheus_wants_them() -> None:
    assert len(ALL) == len(MOUNT) + len(GROUPS)
    for name, metric in ALL.items():
        assert re.fullmatch(r"clonefs_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert not re.search(r"_(bucket|sum|count)$", name)
        assert metric.kind in ("counter", "gauge", "histogram")
        assert "mountpoint" not in metric.labels
        assert not re.search(r"[\\\n]", metric.text), "the text of HELP would need escapes"


# The page


def documented() -> dict[str, list[str]]:
    """The rows of the two tables: type, unit, labels, meaning."""
    text = page("metrics.md")
    rows = [
        row
        for heading in ("## The mount", "## Groups and clones")
        for row in cells(tables(section(text, heading))[0])[1:]
    ]
    return {bare(name): rest for name, *rest in rows}


def test_every_metric_is_documented_as_it_is() -> None:
    told = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), f"{meaning}.")
        for name, (kind, _, labels, meaning) in documented().items()
    }
    assert told == {name: (each.kind, each.labels, each.text) for name, each in ALL.items()}


def test_the_unit_is_in_the_name() -> None:
    for name, (_, unit, *_) in documented().items():
        for word in ("seconds", "bytes", "extents"):
            has_it = word in name.removesuffix("_total").removesuffix("_per_second")
            assert (unit.split()[0] == word) == has_it, name


# The dashboard


def expressions(node: object) -> list[str]:
    """All queries of the dashboard."""
    if isinstance(node, list):
        return [found for each in node for found in expressions(each)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("expr", "query") if isinstance(node.get(key), str)]
    return own + [found for each in node.values() for found in expressions(each)]


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    told = expressions(json.loads(DASHBOARD.read_text()))
    used = {name for each in told for name in re.findall(r"clonefs_\w+", each)}
    there = set(ALL)
    for name, metric in ALL.items():
        if metric.kind == "histogram":
            there |= {f"{name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    assert used <= there
    assert len(told) > 30
    for expression in told:
        for name, chosen in re.findall(r"(clonefs_\w+)\{([^}]*)\}", expression):
            metric = ALL[re.sub(r"_(bucket|sum|count)$", "", name)]
            labels = re.findall(r"(\w+)=", chosen)
            assert set(labels) <= {"mountpoint", *metric.labels}, expression


def test_the_alerts_of_the_page_ask_only_for_what_there_is() -> None:
    used = set(re.findall(r"\bclonefs_[a-z_]+", page("metrics.md")))
    assert used == set(ALL)


def lost(before: object, after: object, where: str = "") -> list[str]:
    """What is in `before` and not, or otherwise, in `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            found
            for key in before
            for found in lost(before[key], after.get(key, "nothing"), f"{where}.{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [found for n, pair in pairs for found in lost(*pair, f"{where}[{n}]")]
    return [] if before == after else [f"{where}: {before!r} became {after!r}"]


def loaded(dashboard: dict[str, Any]) -> Any:
    """What Grafana's own schema keeps of it, panels and their options included."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def test_the_dashboard_is_one_by_the_schema_of_grafana() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert lost(dashboard, loaded(dashboard)) == []
    panel = next(each for each in dashboard["panels"] if each["type"] == "stat")
    panel["options"]["nonsense"] = panel["nonsense"] = 1
    assert len(lost(dashboard, loaded(dashboard))) == 2


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    identities = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        places = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not places & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= places
        identities.add(panel["id"])
    assert len(identities) == len(json.loads(DASHBOARD.read_text())["panels"])
