"""A real sshd on this machine with a configuration, keys and port of its own, and a link to it that can be cut."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
USER = os.environ.get("BITTAILOR_TEST_USER") or getpass.getuser()
"""Who is logged in: another user that exists here, if root runs the tests and says so; else this one."""


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Server:
    """Where it listens, the key that it lets in, and the host key that it shows."""

    port: int
    identity: Path
    host_key: str

    def known_hosts(self, path: Path, port: int, key: str = "") -> Path:
        path.write_text(f"[127.0.0.1]:{port} {key or self.host_key}\n")
        return path


def other_key(folder: Path) -> str:
    """A host key that is nobody's."""
    return _public(_key(folder / "other_key"))


def _public(path: Path) -> str:
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """An sshd that lets USER in with one key, until the block ends."""
    assert SSHD
    folder.chmod(0o755)
    host, identity, port = _key(folder / "host_key"), _key(folder / "identity"), free_port()
    authorized = folder / "authorized_keys"
    shutil.copy(identity.with_suffix(".pub"), authorized)
    lines = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": host,
        "AuthorizedKeysFile": authorized,
        "PidFile": folder / "pid",
        "StrictModes": "no",  # the temporary folder's parents are everybody's
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "yes",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists, and a container that boots nothing has none
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        _wait_for(port)
        yield Server(port, identity, _public(host))
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class Cable:
    """A TCP relay to the server. `when(number, bytes sent, seconds)` is asked again and again of each connection (from 1 on); where it
    says yes, the connection is cut without a word. `cuts` counts them."""

    def __init__(self, to: int, when: Callable[[int, int, float], bool]) -> None:
        self.port, self.connections, self.cuts = free_port(), 0, 0
        self._to, self._when = to, when
        self._socket = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._relay, args=(here, self.connections), daemon=True).start()

    def _relay(self, here: socket.socket, number: int) -> None:
        there = socket.create_connection(("127.0.0.1", self._to))
        start, sent = time.monotonic(), [0]

        def copy(source: socket.socket, target: socket.socket, counted: bool) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 14):
                    target.sendall(data)
                    sent[0] += len(data) if counted else 0
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        threads = [threading.Thread(target=copy, args=words, daemon=True) for words in ((here, there, True), (there, here, False))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self._when(number, sent[0], time.monotonic() - start):
                self.cuts += 1
                for end in (here, there):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                break
            time.sleep(0.01)
        here.close()
        there.close()
