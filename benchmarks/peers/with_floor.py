"""The floor: no guarantees, about two commands per request. The most that Python does over one server, to compare with."""

from urllib.parse import urlsplit

from benchmarks.floor.client import Client
from benchmarks.peers.measure import URL, measure, run


async def main() -> None:
    client = Client()
    await client.start(urlsplit(URL).port or 6379)
    await measure(client)


if __name__ == "__main__":
    run(main())
