"""The systems: what each is made of, and how its one worker is started. Why these settings is in its `with_` module."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class System:
    name: str
    packages: tuple[str, ...]  # none: this very environment
    worker: tuple[str, ...]  # arguments of Python, with {port} and {url}; none: the client starts it
    needs: tuple[int, int] = (3, 11)


def module(name: str) -> str:
    return f"benchmarks.peers.with_{name}"


def command(script: str, *arguments: str) -> tuple[str, ...]:
    """As the command that a package installs: the import of what it calls, and how it is called."""
    return ("-c", f"from {script}", *arguments)


UVLOOP, HIREDIS, REDIS = "uvloop==0.23.0", "hiredis==3.5.0", "redis==8.1.0"

FLOOR = System("floor", (), ("-m", "benchmarks.floor.worker", "{port}"))

SYSTEMS = (
    FLOOR,
    System("millstream", (), command("millstream.cli import main; main()", "run", f"{module('millstream')}:app")),
    System("ray", ("ray[serve]==2.60.0",), ()),
    System(
        "celery",
        ("celery==5.7.0", REDIS, HIREDIS, "packaging==24.2"),
        (
            "-m", "celery", "-A", module("celery"), "worker", "-P", "solo", "-l", "WARNING",
            "--without-gossip", "--without-mingle", "--without-heartbeat",
        ),
    ),
    System(
        "rq",
        ("rq==3.0.0", HIREDIS),
        command("rq.cli import main; main()", "worker", "-u", "{url}", "-w", "rq.SimpleWorker", "-q"),
    ),
    System(
        "dramatiq",
        ("dramatiq[redis]==2.2.1", HIREDIS),
        ("-m", "dramatiq", module("dramatiq"), "--processes", "1", "--threads", "8"),
    ),
    System(
        "huey",
        ("huey==3.5.4", REDIS, HIREDIS),
        ("-m", "huey.bin.huey_consumer", f"{module('huey')}.huey", "-k", "thread", "-w", "8", "--quiet"),
    ),
    System("arq", ("arq==0.28.0", UVLOOP), command(f"{module('arq')} import WorkerSettings; from arq import run_worker; run_worker(WorkerSettings)")),
    System("saq", ("saq[hiredis]==0.26.4", "typing-extensions==4.16.0", UVLOOP), ("-m", "saq", f"{module('saq')}.settings")),
    System(
        "taskiq",
        ("taskiq==0.13.0", "taskiq-redis==1.2.4", UVLOOP, HIREDIS),
        (
            "-m", "taskiq", "worker", f"{module('taskiq')}:broker", "--workers", "1",
            "--max-async-tasks", "500", "--log-level", "WARNING",
        ),
    ),
    System("streaq", ("streaq==7.2.0", UVLOOP, HIREDIS), command(f"{module('streaq')} import worker; worker.run_sync()")),
    System(
        "tarsk",
        ("tarsk-redis==0.2.1",),
        command(
            "tarsk._cli import main; raise SystemExit(main())", "worker", "--app", f"{module('tarsk')}:app",
            "--broker", "{url}", "--children", "1",
        ),
    ),
    System("ardiq", ("ardiq==1.2.0",), ("-m", "ardiq", "run", "--quiet", f"{module('ardiq')}:app"), needs=(3, 12)),
)  # fmt: skip
