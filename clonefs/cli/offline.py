"""dump and check: what a metadata volume holds, and whether it is sound, while nobody has it mounted.

Both hold the volume's lock, so that what they see stands still, and map it so that nothing they do
reaches it. Only `check --repair` opens it for writing, and for no longer than that takes.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clonefs.cli import arguments
from clonefs.errors import ClonefsError, failed

if TYPE_CHECKING:
    from clonefs.volume import Medium
    from clonefs.volume.check import Finding


@click.command()
@click.argument("meta", type=arguments.file)
@click.option("--json", "as_json", is_flag=True, help="Print all of it, for programs.")
def dump(meta: Path, as_json: bool) -> None:
    """Show what the metadata volume META holds.

    Nobody may have it mounted meanwhile, unless read-only. It shows the superblock, the records, the
    groups and clones, their live maps and their durable maps. Of a damaged volume it shows what can
    be read. Nothing is changed. Long extent lists are cut short; --json has all of them.

    \b
    Example:
      clonefs dump /var/lib/clonefs.meta
      clonefs dump --json /var/lib/clonefs.meta | jq .groups.payroll.clones.nightly.delta_map.count
    """
    from clonefs.volume.dump import describe
    from clonefs.volume.volume import this_boot

    with _opened(meta, read_only=True) as medium:
        described = describe(medium, this_boot())
    if as_json:
        click.echo(json.dumps(described, indent=2))
    else:
        for line in _lines(described):
            click.echo(line)


@click.command()
@click.argument("meta", type=arguments.file)
@click.option("--repair", is_flag=True, help="Mend what can be mended without a guess.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs instead.")
def check(meta: Path, repair: bool, as_json: bool) -> None:
    """Check whether the metadata volume META is sound.

    Nobody may have it mounted meanwhile, unless read-only. There is one line for each thing that is
    wrong or worth a note, and what the next mount will do. What a crash leaves is a note at most, for
    the next mount recovers by itself; only a record that it has cut off looks like one that has gone
    bad. With --repair copies are mended from each other, and maps whose bits are lost are made to say
    that all may differ: that costs copying and no data. What could only be guessed is left alone.
    Keep a copy of META before you repair it.

    Exit status: 0 if it is sound, 1 if something is wrong.

    \b
    Example:
      clonefs check /var/lib/clonefs.meta
      clonefs check --repair /var/lib/clonefs.meta
    """
    mended = _repair(meta) if repair else []
    found, next_mount = _look(meta)
    if as_json:
        findings = {"repaired": _as_json(mended), "found": _as_json(found)}
        click.echo(
            json.dumps({"volume": str(meta), **findings, "next_mount": next_mount}, indent=2)
        )
    else:
        for line in _findings(mended, found, next_mount):
            click.echo(line)
    _sum_up(meta, found)


def _findings(
    mended: "Sequence[Finding]", found: "Sequence[Finding]", next_mount: list[str]
) -> Iterator[str]:
    yield from (f"repaired: {each.where}: {each.text}" for each in mended)
    for each in found:
        hint = " (--repair mends it)" if each.repairable else ""
        yield f"{each.severity}: {each.where}: {each.text}{hint}"
    yield from (f"next mount: {line}" for line in next_mount)


def _as_json(found: "Sequence[Finding]") -> list[dict[str, object]]:
    return [
        {
            "severity": each.severity,
            "where": each.where,
            "text": each.text,
            "repairable": each.repairable,
        }
        for each in found
    ]


def _sum_up(meta: Path, found: "tuple[Finding, ...]") -> None:
    from clonefs.volume.check import Severity

    wrong = [finding for finding in found if finding.severity is Severity.WRONG]
    notes = len(found) - len(wrong)
    if not wrong:
        noted = f", with {_counted(notes, 'note')}" if notes else ""
        click.echo(f"clonefs: {meta} is sound{noted}", err=True)
        return
    mendable = sum(finding.repairable for finding in wrong)
    raise failed(
        f"{meta} is not sound: {_counted(len(wrong), 'finding')}, of which --repair can mend "
        f"{mendable or 'none'}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextmanager
def _opened(meta: Path, *, read_only: bool) -> "Iterator[Medium]":
    from clonefs.volume.volume import open_medium

    medium = open_medium(meta, read_only=read_only)
    try:
        yield medium
    finally:
        medium.close()


def _repair(meta: Path) -> "list[Finding]":
    """Mend what can be mended; what that was."""
    from clonefs.volume.check import examine, repair
    from clonefs.volume.volume import this_boot

    with _opened(meta, read_only=False) as medium:
        mended = [each for each in examine(medium, this_boot()) if each.repairable]
        repair(medium, mended)
    return mended


def _look(meta: Path) -> "tuple[tuple[Finding, ...], list[str]]":
    """What is to be said of the volume, and what the next mount will do with it."""
    from clonefs.engines.recovery import foretell
    from clonefs.engines.stamps import look_offline
    from clonefs.volume import MetadataVolume
    from clonefs.volume.check import Fault, examine
    from clonefs.volume.volume import open_medium, this_boot

    boot_id = this_boot()
    medium = open_medium(meta, read_only=True)
    found: tuple[Finding, ...] = ()
    try:
        found = examine(medium, boot_id)
        volume = MetadataVolume(medium, boot_id)
    except ClonefsError as error:
        medium.close()
        return found, [f"it is refused: {error.reason}"]
    except BaseException:
        medium.close()
        raise
    try:
        if any(finding.fault in (Fault.STRUCTURE, Fault.MAP_SLOT) for finding in found):
            return found, ["do not mount it: the record contradicts itself"]
        return found, foretell(volume, look_offline(volume).reasons)
    finally:
        volume.close(clean=False)


# The dump for people


def _lines(described: dict[str, Any]) -> Iterator[str]:
    yield from _volume(described["volume"])
    for slot in described["record_slots"]:
        yield _record_slot(slot)
    record = described["record"]
    if record is None:
        yield "no record can be read: nothing is known of groups and maps"
        return
    yield from _record(record)
    for name, group in described["groups"].items():
        yield ""
        yield from _group(name, group)


def _volume(volume: dict[str, Any]) -> Iterator[str]:
    from clonefs.extents import format_size

    yield (
        f"{volume['path']}: {format_size(volume['formatted_size'])}, UUID {volume['uuid']}, "
        f"format version {volume['format_version']}, maps from byte {volume['first_map_byte']}"
    )
    if volume["damage"] is not None:
        yield f"DAMAGED: {volume['damage']}; what follows is read as far as it can be"


def _record_slot(slot: dict[str, Any]) -> str:
    generation = "none" if slot["generation"] is None else slot["generation"]
    condition = "valid" if slot["valid"] else f"DAMAGED: {slot['damage']}"
    newest = ", the newest" if slot["newest"] else ""
    return (
        f"record slot {slot['slot']} at byte {slot['offset']}: generation {generation}, "
        f"{condition}{newest}"
    )


def _record(record: dict[str, Any]) -> Iterator[str]:
    if record["damaged"]:
        yield (
            f"what follows is from the damaged record in slot {record['slot']}: it may be anything"
        )
    if record["doubtful"]:
        yield "a write to the volume has failed: live maps are taken with what durable ones have besides"
    if record["clean"]:
        yield "closed cleanly: the live maps would be trusted now"
    elif record["live_maps_trusted"]:
        yield "not closed, in this boot of the machine: the live maps would be trusted now"
    else:
        yield (
            f"not closed, and the machine went down (boot {record['boot_id'] or 'unknown'}): the live "
            f"maps would not be trusted, and filled from the durable ones"
        )


def _group(name: str, group: dict[str, Any]) -> Iterator[str]:
    from clonefs.extents import format_size

    if group["damage"] is not None:
        yield f"group {name}: DAMAGED: {group['damage']}"
        return
    yield (
        f"group {name}: {format_size(group['size'])} in {group['extents']} extents of "
        f"{format_size(group['extent_size'])}, restore number {group['epoch']}, "
        f"Source {group['backing']}"
    )
    yield from _map("Protected Restore Map", group["protected_restore_map"])
    yield from _durable(group["durable"])
    for clone, held in group["clones"].items():
        yield f"  clone {clone}: {held['state']}{_split(held)}, {held['backing']}"
        yield from _map("  Delta Map", held["delta_map"])


def _split(clone: dict[str, Any]) -> str:
    words = [clone["split_by"] or "", "written to" if clone["written"] else "", clone["reason"]]
    told = ", ".join(word for word in words if word)
    return f" ({told})" if told else ""


def _map(what: str, held: dict[str, Any]) -> Iterator[str]:
    yield f"  {what}: {_held(held)}, {_at(held)}"


def _at(held: dict[str, Any]) -> str:
    return f"{held['slot']['length']} bytes at byte {held['slot']['offset']}"


def _held(held: dict[str, Any]) -> str:
    from clonefs.volume.dump import shortened

    if held.get("damage") is not None:
        return f"DAMAGED: {held['damage']}"
    count = _counted(held["count"], "extent")
    return f"{count} ({shortened(held['extents'])})" if held["count"] else count


def _durable(durable: dict[str, Any]) -> Iterator[str]:
    from clonefs.volume.dump import shortened

    if durable["damage"] is not None:
        yield from _map("durable maps", durable)
        return
    for key, what in (
        ("persistent_delta_map", "Persistent Delta Map"),
        ("persistent_protected_restore_map", "Persistent Protected Restore Map"),
    ):
        held = durable[key]
        yield f"  {what}: {_held(held)}"
        if held["damaged"]:
            yield f"    DAMAGED: sectors {shortened(held['damaged'])} cannot be read in any copy"
        for number, copy in enumerate(held["copies"], 1):
            yield f"    copy {number} at byte {copy['offset']}: {_copy(copy)}"


def _copy(copy: dict[str, Any]) -> str:
    from clonefs.volume.dump import shortened

    words = [f"{copy['written']} of {_counted(copy['sectors'], 'sector')} written"]
    if copy["generations"] is not None:
        low, high = copy["generations"]
        words.append(f"generation {low}" if low == high else f"generations {low} to {high}")
    if any(copy["epochs"]):
        words.append(f"of restore number {', '.join(str(epoch) for epoch in copy['epochs'])}")
    if copy["damaged"]:
        words.append(f"DAMAGED: {shortened(copy['damaged'])}")
    return ", ".join(words)
