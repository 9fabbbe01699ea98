"""Tell systemd how the daemon is: the few lines of sd_notify(3) that a mount needs.

Whoever starts a service of Type=notify names a datagram socket in NOTIFY_SOCKET, and reads lines
NAME=VALUE from it. Without that variable nobody wants to know, and nothing is sent. A service
manager that does not listen must not keep a mount from being used: then it is only logged.
"""

import logging
import os
import socket

_log = logging.getLogger(__name__)


def ready(status: str) -> None:
    """The service is up: units that come after it may start. `status` is a line for people."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    message = f"READY=1\nSTATUS={' '.join(status.splitlines())}\n"
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket: it has no file
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(os.fsencode(message))
    except (OSError, ValueError) as error:
        _log.warning("the service manager at NOTIFY_SOCKET could not be told: %s", error)
