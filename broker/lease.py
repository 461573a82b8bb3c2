"""How long who lives is taken for granted: one number, and what follows from it.

A host that vanishes is found out within one lease: its last renewal holds for three quarters of it, and somebody looks
in what is left.
"""

from dataclasses import dataclass

from millstream.config import Settings


@dataclass(frozen=True, slots=True)
class Lease:
    """All in seconds. Every process of an installation should go by the same lease."""

    seconds: float

    @classmethod
    def of(cls, settings: Settings) -> "Lease":
        return cls(settings.lease_s)

    @property
    def ttl_s(self) -> float:
        """What a renewal is good for."""
        return self.seconds * 0.75

    @property
    def renew_every_s(self) -> float:
        """Two renewals in a row may be lost."""
        return self.seconds / 4

    @property
    def look_every_s(self) -> float:
        """Between two sweeps, on average."""
        return min(1.0, self.seconds / 5)

    @property
    def most_unwatched_s(self) -> float:
        """Between two sweeps, by the server's clock. After longer ones the living may not have been able to renew."""
        return self.seconds / 2

    @property
    def block_s(self) -> float:
        """Of a blocking read: that of a dead replica must not outlive its burial."""
        return self.seconds / 2
