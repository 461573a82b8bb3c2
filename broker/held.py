"""A parked or delayed request as the server keeps it: what `lua/held.lua` packs, read."""

from typing import NamedTuple


class HeldRequest(NamedTuple):
    """`waits`: "-" for its time only, the id of the one ref it waits for, or "*" for several, noted beside it."""

    lane: str
    due_ms: int  # on the server's clock; 0: as soon as it has its values
    waits: str
    method: str
    client: str
    fields: dict[str, bytes]  # what it says about itself beyond the usual
    envelope: bytes

    @classmethod
    def read(cls, packed: bytes) -> "HeldRequest":
        """ValueError if it is none."""
        first, lengths, rest = packed.split(b"\n", 2)
        lane, due_ms, waits = first.decode().split(" ")
        parts = []
        for length in map(int, lengths.split()):
            parts.append(rest[:length])
            rest = rest[length:]
        method, client, *more = parts
        fields = dict(zip([name.decode() for name in more[::2]], more[1::2], strict=True))
        return cls(lane, int(due_ms), waits, method.decode(), client.decode(), fields, rest)

    def packed(self) -> bytes:
        """As the server keeps it."""
        parts = [self.method.encode(), self.client.encode()]
        for name, value in self.fields.items():
            parts += (name.encode(), value)
        lengths = " ".join(str(len(part)) for part in parts)
        return b"".join([f"{self.lane} {self.due_ms} {self.waits}\n{lengths}\n".encode(), *parts, self.envelope])
