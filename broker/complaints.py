"""What in Redis cannot be read, because some other program wrote it: said once, not at each look."""

import logging

MOST = 1000  # different ones that are remembered


class Complaints:
    """Says each thing once; again only if it has been well in between (`well`)."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: dict[str, str] = {}

    def about(self, what: str, why: object) -> None:
        """`what` (a key, a field) cannot be read."""
        text = str(why)
        if self._said.get(what) != text and len(self._said) < MOST:
            self._said[what] = text
            self._log.error("%s cannot be read (%s): some other program wrote it; it is passed over", what, text)

    def well(self, what: str) -> None:
        """It can be read (again)."""
        if self._said and self._said.pop(what, None) is not None:
            self._log.warning("%s can be read again", what)
