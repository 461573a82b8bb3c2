"""The warm parents of a node: one per application and version, and a spare one whose Python is up already."""

import asyncio
import logging

from millstream.config import Settings
from millstream.replicas.process import CannotFork, WarmFailed, WarmParent

log = logging.getLogger("millstream.launcher")


class Parents:
    """Makes them, finds them, lets them go. Replicas that they forked live on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._shared: dict[tuple[str, str], WarmParent] = {}
        self._spare: WarmParent | None = None
        self._unforkable: set[tuple[str, str]] = set()  # (app, version) that started threads while it was imported

    def start_spare(self) -> None:
        """The first application then need not wait for a Python."""
        self._spare = WarmParent(self._settings)

    def knows(self, app: str, version: str) -> bool:
        return (app, version) in self._shared or (app, version) in self._unforkable

    async def find(self, app: str, version: str, tags: list[str], *, fork_anyway: bool) -> WarmParent | None:
        """The parent that forks this application's replicas, started if need be; None when it may not be forked."""
        key = (app, version)
        if key in self._unforkable:
            return None
        parent = self._shared.get(key)
        if parent is None or not parent.is_alive:
            parent = self._shared[key] = self._blank()
            parent.warming = asyncio.ensure_future(parent.warm(app, tags, spawn=False, fork_anyway=fork_anyway))
        try:
            assert parent.warming is not None
            await asyncio.shield(parent.warming)
            return parent
        except CannotFork as e:
            if key not in self._unforkable:
                self._unforkable.add(key)
                self._shared.pop(key, None)
                log.warning("%s: %s; its replicas start as fresh processes, more slowly", app, e)
            return None
        except WarmFailed:
            self._shared.pop(key, None)
            raise

    async def become(self, app: str, tags: list[str]) -> WarmParent:
        """A process that will be one replica. Raises WarmFailed."""
        parent = self._blank()
        await parent.warm(app, tags, spawn=True)
        return parent

    def close_unused(self, used: set[tuple[str, str]]) -> None:
        for key in self._shared.keys() - used:
            self._shared.pop(key).close()

    def close(self) -> None:
        for parent in (*self._shared.values(), *([self._spare] if self._spare else [])):
            parent.close()

    def _blank(self) -> WarmParent:
        spare, self._spare = self._spare, None
        return spare if spare is not None and spare.is_alive else WarmParent(self._settings)
