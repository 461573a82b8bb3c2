"""The world of a run: server, proxy, launchers, autoscaler and clients; and what is done to them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import millstream
from chaos import application, ledger, proxy
from chaos.judge import Fault
from chaos.members import Member, descendants, lives, signal_all
from chaos.plan import Harm, Planned, ServerFaults
from chaos.server import Server, free_port
from millstream import serve

ROOT = Path(__file__).parent.parent
NODES = 2
LOOK_EVERY_S = 0.02
UP_TIMEOUT_S = 90.0
HANGS_AFTER_S = 60.0  # a client that has not ended so long after the last fault was over hangs
DRAIN_TIMEOUT_S = 60.0
SECRET = "chaos"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests, by how many clients, at which rate in all."""

    seed: int
    requests: int
    clients: int
    rate: float

    @property
    def duration_s(self) -> float:
        return self.requests / self.rate


class World:
    """Use as a context manager: all that it has started ends with it."""

    def __init__(self, folder: Path, load: Load, how: ServerFaults, say: Callable[[str], None]) -> None:
        self._folder, self._load, self._say = folder, load, say
        self.clients_ledger, self.replicas_ledger = folder / "clients.ledger", folder / "replicas.ledger"
        (folder / "raised").mkdir(parents=True)
        self.server = Server(folder / "server", free_port(), how)
        proxied = free_port()
        self._environment = {
            **os.environ, "MILLSTREAM_URL": f"redis://127.0.0.1:{proxied}", "MILLSTREAM_SECRET_KEY": SECRET,
            "MILLSTREAM_NAMESPACE": "ms", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            application.LEDGER: str(self.replicas_ledger), application.RAISED: str(folder / "raised"),
        }  # fmt: skip
        self._proxied = proxied
        self._proxy: subprocess.Popen[bytes] | None = None
        self._launchers = [self._member(f"launcher-{i}", self._launcher(i)) for i in range(NODES)]
        self._autoscaler = self._member("autoscaler", lambda _: ["millstream", "autoscaler", "--owned"])
        self._clients = [self._member(f"client-{i}", self._client(i)) for i in range(load.clients)]
        self._replicas: dict[str, int] = {}  # that have come up, by name -> pid
        self._read_to = 0
        self._frozen: list[tuple[float, list[int]]] = []  # until when, who
        self._over_s = 0.0  # when all that was done so far is over
        self._restarting: tuple[threading.Thread, float] | None = None  # the server, since when
        self.faults: list[Fault] = []
        self.started_s = 0.0

    def _member(self, name: str, command: Callable[[int], list[str]]) -> Member:
        return Member(name, command, self._environment, self._folder / f"{name}.log")

    def _launcher(self, i: int) -> Callable[[int], list[str]]:
        return lambda _: ["millstream", "launcher", "--node", f"host-{i}", "--owned"]

    def _client(self, i: int) -> Callable[[int], list[str]]:
        load = self._load
        share = [str(load.seed), str(i)], [str(load.requests // load.clients), str(load.rate / load.clients)]
        return lambda generation: ["chaos.client", *share[0], str(generation), *share[1], str(self.clients_ledger)]

    # its life

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self.server.start()
        command = [sys.executable, "-m", proxy.__name__, str(self._proxied), str(self.server.port)]
        self._proxy = subprocess.Popen(command, env=self._environment, stdin=subprocess.PIPE, cwd=self._folder)
        for member in (*self._launchers, self._autoscaler):
            member.start()
        millstream.init(f"redis://127.0.0.1:{self.server.port}", namespace="ms", secret_key=SECRET)
        serve.deploy_only(application.app, timeout_s=UP_TIMEOUT_S)

    def close(self) -> None:
        if self._restarting is not None:
            self._restarting[0].join()
        millstream.shutdown()
        for _, pids in self._frozen:
            signal_all(pids, signal.SIGCONT)
        started = [pid for member in self._launchers if member.pid for pid in descendants(member.pid)]
        for client in self._clients:
            if client.process is not None:
                client.process.kill()
            client.end(5.0)
        self._autoscaler.end(10.0)
        for launcher in self._launchers:
            launcher.close_stdin()
        for launcher in self._launchers:
            launcher.end(DRAIN_TIMEOUT_S)
        signal_all([pid for pid in {*started, *self._replicas.values()} if _is_ours(pid)], signal.SIGKILL)
        if self._proxy is not None and self._proxy.stdin is not None:
            self._proxy.stdin.close()
            self._proxy.wait(10)
        self.server.stop()

    # a run

    def run(self, planned: list[Planned]) -> None:
        """Have the clients do their work, and the faults come in their time. Ends when all clients have, or hang."""
        for client in self._clients:
            client.start()
        self.started_s = time.monotonic()
        waiting = list(planned)
        while not all(client.has_left for client in self._clients):
            now_s = time.monotonic()
            if waiting and now_s >= self.started_s + waiting[0].at_s:
                self._harm(waiting.pop(0))
            self._look(now_s)
            if not waiting and not self._frozen and self._restarting is None and self._hangs(now_s):
                self._say("clients hang: the run ends here")
                return
            time.sleep(LOOK_EVERY_S)

    def _hangs(self, now_s: float) -> bool:
        return now_s > max(self._over_s, self.started_s + self._load.duration_s * 3) + HANGS_AFTER_S

    def _look(self, now_s: float) -> None:
        """Thaw what was frozen for long enough; start what is to be there again; see which replicas have come."""
        self.server.look()
        for until_s, pids in [frozen for frozen in self._frozen if now_s >= frozen[0]]:
            signal_all(pids, signal.SIGCONT)
            self._frozen.remove((until_s, pids))
        for member in (*self._launchers, self._autoscaler, *self._clients):
            member.look()
        self._see_server_back()
        lines, self._read_to = ledger.read(self.replicas_ledger, self._read_to)
        self._replicas.update((line.who, int(line.what)) for line in lines if line.event == "up")

    @property
    def failures(self) -> list[str]:
        """Processes that ended with an error, and that nobody had killed."""
        members = (*self._launchers, self._autoscaler, *self._clients)
        return [failure for member in members for failure in member.failures]

    # harm

    def _harm(self, planned: Planned) -> None:
        at_s = time.monotonic()
        if planned.harm is Harm.SERVER:
            self._restart_server(planned, at_s)
            return
        fault = self._done(planned, at_s)
        if fault is None:
            self._say(f"{at_s - self.started_s:6.1f} s  {planned.harm}: there is none")
            return
        self._note(fault)

    def _note(self, fault: Fault) -> None:
        self.faults.append(fault)
        self._over_s = max(self._over_s, fault.until_s)
        at_s = fault.at_s
        also = f" {' '.join(map(str, fault.pids))}" if fault.pids else ""
        self._say(f"{at_s - self.started_s:6.1f} s  {fault.harm}{also}, for {fault.until_s - at_s:.1f} s")

    def _done(self, planned: Planned, at_s: float) -> Fault | None:
        harm, lasts_s = planned.harm, planned.lasts_s
        match harm:
            case Harm.KILL_REPLICA | Harm.STOP_REPLICA | Harm.PAUSE_REPLICA:
                return self._harm_replica(planned)
            case Harm.KILL_LAUNCHER | Harm.KILL_AUTOSCALER | Harm.KILL_CLIENT | Harm.VANISH_HOST:
                return self._kill_member(planned, at_s)
            case Harm.PAUSE_LAUNCHER:
                victim = _pick([m.pid for m in self._launchers if m.pid and not self._is_frozen(m.pid)], planned.target)
                return None if victim is None else self._freeze(harm, victim, at_s, lasts_s)
            case Harm.CUT:
                self._order(f"cut 0.5 {int(planned.target * 1e9)}")
                return Fault(at_s, at_s + proxy.AT_LATEST_S, harm)
            case Harm.STALL:
                self._order(f"stall {lasts_s}")
                return Fault(at_s, at_s + lasts_s, harm)
            case _:
                return None  # the server has a thread of its own

    def _restart_server(self, planned: Planned, at_s: float) -> None:
        """In a thread: other faults go on meanwhile."""
        if self._restarting is None:
            thread = threading.Thread(target=self.server.restart, args=[planned.lasts_s])
            thread.start()
            self._restarting = thread, at_s

    def _see_server_back(self) -> None:
        if self._restarting is not None and not self._restarting[0].is_alive():
            at_s, self._restarting = self._restarting[1], None
            self._note(Fault(at_s, time.monotonic(), Harm.SERVER, loses_data=self.server.loses_data))

    def _harm_replica(self, planned: Planned) -> Fault | None:
        alive = sorted(pid for pid in self._replicas.values() if lives(pid) and not self._is_frozen(pid))
        victim = _pick(alive, planned.target)
        if victim is None:
            return None
        at_s = time.monotonic()  # to look for them took some ms, in which attempts start
        if planned.harm is Harm.KILL_REPLICA:
            os.kill(victim, signal.SIGKILL)
            return Fault(at_s, time.monotonic(), planned.harm, (victim,), kills=1)
        # One that is stopped for good is killed by its launcher; it wakes up only if nobody did that for very long.
        for_s = planned.lasts_s or application.HEALTH_TIMEOUT_S + 20.0
        return self._freeze(planned.harm, victim, at_s, for_s)

    def _freeze(self, harm: Harm, victim: int, at_s: float, for_s: float) -> Fault:
        os.kill(victim, signal.SIGSTOP)
        self._frozen.append((at_s + for_s, [victim]))
        return Fault(at_s, at_s + for_s, harm, (victim,))

    def _is_frozen(self, pid: int) -> bool:
        return any(pid in pids for _, pids in self._frozen)

    def _kill_member(self, planned: Planned, at_s: float) -> Fault | None:
        members = {
            Harm.KILL_AUTOSCALER: [self._autoscaler], Harm.KILL_CLIENT: self._clients,
        }.get(planned.harm, self._launchers)  # fmt: skip
        member = _pick([m for m in members if m.pid and not self._is_frozen(m.pid)], planned.target)
        if member is None or member.pid is None:
            return None
        pids = [member.pid]
        if planned.harm is Harm.VANISH_HOST:
            pids += descendants(member.pid)
        member.kill(planned.lasts_s)  # first: it must not see the end of the others
        killed = [pids[0], *signal_all(pids[1:], signal.SIGKILL)]
        return Fault(at_s, at_s + planned.lasts_s, planned.harm, tuple(killed), kills=len(killed))

    def _order(self, order: str) -> None:
        assert self._proxy is not None and self._proxy.stdin is not None
        self._proxy.stdin.write(f"{order}\n".encode())
        self._proxy.stdin.flush()


def _pick(among: list[T], target: float) -> T | None:
    return among[int(target * len(among))] if among else None


def _is_ours(pid: int) -> bool:
    """Is it still one of millstream's, and not a stranger with its number?"""
    with contextlib.suppress(OSError):
        return b"millstream" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Within the block, the working directory is one without a server."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
