"""The status table, and status.json: statistics as text."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from clonefs.engines import CloneStatistics, GroupStatistics, Recovery, VerifyStatistics
from clonefs.extents import format_size
from clonefs.volume import MetadataVolume

_HEAD = ("NAME", "STATE", "CONDITION", "PROGRESS", "DELTA", "SIZE", "RATE", "FRACTURED", "BACKING")


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch in the form of ISO 8601, in UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def copy_text(full_copies: bool) -> str:
    """How a group copies, as its control file shows it."""
    return "full" if full_copies else "auto"


def rate_text(rate: int | None) -> str:
    """A rate as its control file shows it."""
    return "max" if rate is None else format_size(rate)


def verify_text(verify: VerifyStatistics | None) -> str:
    """What the file `verify` shows."""
    if verify is None:
        return "idle\n"
    return (
        f"{verify.state} {verify.done}/{verify.total} {verify.different} differ "
        f"{verify.unreadable} unreadable\n"
    )


def differences_text(verify: VerifyStatistics | None) -> str:
    """What the last verification has found, as an extent list."""
    return f"{'' if verify is None else verify.differences}\n"


def table(
    groups: Iterable[GroupStatistics],
    error: str | None = None,
    recovery: Recovery | None = None,
) -> str:
    """One aligned table for people. A line for each Source and each clone, errors below, that of the
    metadata volume first, and then what was recovered when it was mounted."""
    rows: list[tuple[str, ...]] = [_HEAD]
    errors = [error] if error else []
    for group in groups:
        rows.append(_source_row(group))
        if group.error:
            errors.append(f"{group.name}: {group.error}")
        for clone in group.clones:
            rows.append(_clone_row(group, clone))
            if clone.error:
                errors.append(f"{group.name}/{clone.name}: {clone.error}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if recovery is not None:
        errors += [f"recovery: {line}" for line in recovery.lines()]
    return "\n".join(lines + errors) + "\n"


def _source_row(group: GroupStatistics) -> tuple[str, ...]:
    state = "-"
    if group.restore is not None:
        verb = "restoring" if group.restore.protected else "reverse-synchronizing"
        state = f"{verb} from {group.restore.clone}"
    size = format_size(group.size)
    return (f"{group.name}/source", state, group.state, "-", "-", size, "-", "-", group.backing)


def _clone_row(group: GroupStatistics, clone: CloneStatistics) -> tuple[str, ...]:
    return (
        f"{group.name}/{clone.name}",
        clone.state,
        clone.condition,
        f"{clone.done}/{clone.total}",
        str(clone.delta_extents),
        "-",
        rate_text(clone.rate),
        timestamp(clone.fractured_at) or "-",
        clone.backing,
    )


def status_json(
    volume: MetadataVolume, groups: Iterable[GroupStatistics], recovery: Recovery | None
) -> str:
    """status.json: the contract for programs. Fields are added, never renamed."""
    status = {
        "volume": {
            "path": volume.name,
            "uuid": volume.uuid,
            "size": volume.superblock.size,
            "used": volume.used,
            "error": volume.broken and volume.broken.reason,
        },
        "daemon": {"pid": os.getpid(), "read_only": volume.read_only},
        "recovery": None
        if recovery is None
        else {
            "at": timestamp(recovery.at),
            "found": recovery.found,
            "damage": list(recovery.damage),
            "done": list(recovery.done),
        },
        "groups": {group.name: _group_json(group) for group in groups},
    }
    return json.dumps(status, indent=2) + "\n"


_HOST_IO = re.compile(r'\n *"host_io": \{[^}]*\},')


def without_host_io(status: str) -> str:
    """status.json without what changes with every request: nobody wants to be woken by that."""
    return _HOST_IO.sub("", status)


def _group_json(group: GroupStatistics) -> dict[str, Any]:
    restore = group.restore
    return {
        "state": group.state,
        "size": group.size,
        "extent_size": group.extent_size,
        "extents": group.extents,
        "backing": group.backing,
        "copy": copy_text(group.full_copies),
        "error": group.error,
        "restore": None
        if restore is None
        else {
            "clone": restore.clone,
            "protected": restore.protected,
            "pending": restore.pending,
            "protected_extents": restore.protected_extents,
            "sync_copies": restore.sync_copies,
            "cod_copies": restore.cod_copies,
            "cod_queue": restore.cod_queue,
        },
        "host_io": asdict(group.host_io),
        "clones": {clone.name: _clone_json(clone) for clone in group.clones},
    }


def _clone_json(clone: CloneStatistics) -> dict[str, Any]:
    return {
        "state": clone.state,
        "condition": clone.condition,
        "backing": clone.backing,
        "delta_extents": clone.delta_extents,
        "progress": {"done": clone.done, "total": clone.total},
        "rate": "max" if clone.rate is None else clone.rate,
        "fractured_at": timestamp(clone.fractured_at),
        "written": clone.written,
        "verify": None if clone.verify is None else asdict(clone.verify),
        "host_io": asdict(clone.host_io),
        "error": clone.error,
    }
