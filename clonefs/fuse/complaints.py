"""I/O errors in the log: the first of an LU at once, and then how many more there were.

A device that fails does so for every request, thousands of times a second. For each LU one line is
written in PERIOD seconds, and none is lost: what was not said is counted and said later. Requests
only get here when they have failed; this must never be on the way of one that has not.
"""

import logging
from dataclasses import dataclass

import trio

log = logging.getLogger(__name__)

PERIOD = 30.0  # seconds


@dataclass(slots=True)
class _Silence:
    """Since when (seconds of trio's clock) nothing has been said of an LU, and what would have been."""

    since: float
    more: int = 0
    last: str = ""


class Complaints:
    """What has been said of which LU. `run` says the rest, for as long as it runs."""

    def __init__(self) -> None:
        self._silences: dict[tuple[str, str], _Silence] = {}
        self._begun = trio.Event()

    def complain(self, group: str, lu: str, sentence: str) -> None:
        """An I/O error of an LU."""
        silence = self._silences.get((group, lu))
        if silence is None:
            self._silences[group, lu] = _Silence(trio.current_time())
            self._begun.set()
            _say(group, f"{group}/{lu}: {sentence}")
        else:
            silence.more += 1
            silence.last = sentence

    async def run(self) -> None:
        """Say how many more there were, at the end of each period and at the very end."""
        try:
            while True:
                await self._begun.wait()
                self._begun = trio.Event()
                while self._silences:
                    await trio.sleep_until(PERIOD + min(s.since for s in self._silences.values()))
                    self._end_silences(trio.current_time() - PERIOD)
        finally:
            self._end_silences(trio.current_time())

    def _end_silences(self, begun: float) -> None:
        """Of the silences that began by then: one with errors in it begins anew, the others end."""
        now = trio.current_time()
        for place, silence in list(self._silences.items()):
            if silence.since > begun:
                continue
            del self._silences[place]
            if silence.more:
                group, lu = place
                seconds = now - silence.since
                told = f"(one of {silence.more} more in the last {seconds:.0f} s)"
                _say(group, f"{group}/{lu}: {silence.last} {told}")
                self._silences[place] = _Silence(now)


def _say(group: str, line: str) -> None:
    log.error("%s", line, extra={"clonefs_group": group})
