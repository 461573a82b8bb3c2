"""How quickly requests end in the threads of a replica; and by that, how many may be taken ahead, to be at hand."""

# What was taken ahead waits here for others to end, while another replica may be free: so long at most, if all goes on
# as before. Where runs take longer than that, nothing is gained: a claim takes a tenth of it.
AHEAD_S = 0.005
MOST = 16
PROVEN = 16  # runs in a row that took less than AHEAD_S
STILL_S = 4 * AHEAD_S  # without an end: then it does not go on as before


class Pace:
    """Of the ends of runs in threads. Times are those of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._last_end = 0.0
        self._mean_s = 0.0
        self._quick_ends = 0

    def ended(self, since: float, now: float) -> None:
        """One ended that was given to the threads at `since`; what it waited for others does not count."""
        took = now - max(since, self._last_end)
        self._last_end = now
        if took >= AHEAD_S:
            self._quick_ends = 0
            return
        self._quick_ends += 1
        self._mean_s += (took - self._mean_s) / min(self._quick_ends, PROVEN)

    @property
    def ahead(self) -> int:
        """So many may be taken beyond what can run at once."""
        if self._quick_ends < PROVEN:
            return 0
        return min(MOST, int(AHEAD_S / max(self._mean_s, AHEAD_S / MOST)))

    def stands_still(self, now: float) -> bool:
        """Has nothing ended for so long that whatever was taken ahead should go to others? Then no more is taken."""
        if now - self._last_end < STILL_S:
            return False
        self._quick_ends = 0
        return True
