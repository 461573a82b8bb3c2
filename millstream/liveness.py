"""Whether a process that left its name in Redis still lives, as far as this host can tell."""

import os
import socket
from pathlib import Path


def may_live(host: str, pid: int) -> bool:
    """False only if it was on this host and is gone. A process of another host, or one that we may not look at, may live."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's, or there is no /proc
        return True
    return state != "Z"  # dead, and nobody has waited for it: the first process of a container often does not
