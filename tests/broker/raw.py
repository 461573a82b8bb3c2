"""What `Bulk` writes and reads, without a signature."""

from collections.abc import Sequence

from millstream.broker.bulk import Part


class Raw:
    """Parts as they are; and what comes, as it is."""

    def __init__(self, *parts: Part) -> None:
        self.parts: Sequence[Part] = parts

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.parts))

    def sign(self) -> bytes:
        return b""

    def update(self, data: memoryview) -> None: ...

    def verified(self, value: memoryview) -> memoryview:
        return value
