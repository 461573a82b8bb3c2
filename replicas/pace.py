"""How quickly requests end in a replica that runs one after the other; and by that, how many may be taken ahead, to be at
hand."""

# What was taken ahead waits here for others to end, while another replica may be free: so long at most, if all goes on
# as before. Where runs take longer than that, nothing is gained: a claim takes a tenth of it.
AHEAD_S = 0.005
MOST = 16  # for threads: to hand one over takes 50 us
MOST_PROMPT = 300  # of what ends where it is called: with more, caller, server and replica wait for each other
PROVEN = 16  # runs in a row that took less than AHEAD_S
STILL_S = 4 * AHEAD_S  # without an end: then it does not go on as before


class Pace:
    """Of the ends of runs. Times are those of one monotonic clock, in seconds."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._last_end = 0.0
        self._mean_s = 0.0
        self._quick_ends = 0

    def ended(self, since: float, now: float) -> None:
        """One ended that was given to the threads at `since`; what it waited for others does not count."""
        took = now - max(since, self._last_end)
        self._last_end = now
        self.ended_together(1, took)

    def ended_together(self, count: int, took_s: float) -> None:
        """So many ended one after the other; in a time in which a single one may have taken most of it."""
        if took_s >= AHEAD_S:
            self.begin_anew()
            return
        self._quick_ends += count
        self._mean_s += (took_s / count - self._mean_s) * min(1.0, count / min(self._quick_ends, PROVEN))

    def begin_anew(self) -> None:
        """It does not go on as before."""
        self._quick_ends = 0

    @property
    def ahead(self) -> int:
        """So many may be taken beyond what can run at once."""
        if self._quick_ends < PROVEN:
            return 0
        return min(self._most, int(AHEAD_S / max(self._mean_s, AHEAD_S / self._most)))

    def stands_still(self, now: float) -> bool:
        """Has nothing ended for so long that whatever was taken ahead should go to others? Then no more is taken."""
        if now - self._last_end < STILL_S:
            return False
        self.begin_anew()
        return True
