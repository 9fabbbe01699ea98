"""The Clone Group: states, maps, and who may do what when. No I/O, no waiting."""

from clonefs.group.cod_queue import CodQueue, WaitingRequest
from clonefs.group.group import Clone, CloneGroup, Obstacle, Route, WriteTicket
from clonefs.group.scoreboard import Claim, CodScoreboard, Engine
from clonefs.group.transitions import MIRRORED, RESTORES, TABLE, Command

__all__ = [
    "MIRRORED",
    "RESTORES",
    "TABLE",
    "Claim",
    "Clone",
    "CloneGroup",
    "CodQueue",
    "CodScoreboard",
    "Command",
    "Engine",
    "Obstacle",
    "Route",
    "WaitingRequest",
    "WriteTicket",
]
