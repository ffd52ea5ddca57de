"""A Flower deployment on this machine: SuperLink and SuperNodes on loopback, HTTPS, node authentication.

Certificates and keys are made for it and thrown away with its folder. Needs ``trustme`` and ``psutil`` (extra dev).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import psutil
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"
_BIN = Path(sys.executable).parent
_TAG = "FEDUNLEARN_DEPLOYMENT"  # an environment variable that every process of it inherits
_CONNECTION = "local"
# Sites have machines of their own: on this one they leave the processor to the SuperLink first.
_BEHIND = ("nice", "-n", "10")


class Deployment:
    """One SuperLink and its SuperNodes; a context manager that leaves no process behind.

    Args:
        folder: for certificates, keys, logs and the SuperLink's database.
        nodes: how many SuperNodes; number ``k`` is client ``k`` of a recipe.
    """

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder.absolute()
        self.count = nodes
        self.ca = self.folder / "ca.crt"
        self._tag = uuid.uuid4().hex
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port, *self._ports = _free_ports(2 + nodes)  # and one for a node that does not belong
        self.folder.mkdir(parents=True)
        make_certificates(self.folder)
        for number in range(nodes):
            make_node_key(self.folder / f"node-{number}")
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n[superlink.{_CONNECTION}]\n'
            f'address = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        )

    @property
    def address(self) -> str:
        """Where the SuperLink listens."""
        return f"{HOST}:{self._port}"

    def __enter__(self) -> Deployment:
        """Start everything and wait until all nodes are connected."""
        try:
            self.start_superlink()
            for number in range(self.count):
                self.register(self.folder / f"node-{number}.pub")
            for number in range(self.count):
                self.start_node(number)
            for number in range(self.count):
                self.wait_for_node(number)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_superlink(self) -> None:
        """Start the SuperLink, on the database it had before if there is one, and wait until it answers."""
        self._start(
            "superlink",
            "flower-superlink",
            *("--host", HOST, "--port", str(self._port), "--database", str(self.folder / "superlink.db")),
            *("--ssl-ca-certfile", str(self.ca)),
            *("--ssl-certfile", str(self.folder / "server.crt"), "--ssl-keyfile", str(self.folder / "server.key")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )
        context = ssl.create_default_context(cafile=str(self.ca))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        for _ in self._while_alive("superlink", 60):
            try:
                with opener.open(f"https://{self.address}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass

    def register(self, public_key: Path) -> None:
        """Admit the node that has this key."""
        self.flwr("supernode", "register", str(public_key), _CONNECTION)

    def start_node(self, number: int, *, key: Path | None = None, ca: Path | None = None) -> None:
        """Start SuperNode ``number``; with another key or CA, to see it refused."""
        self._start(
            f"node-{number}",
            *_BEHIND,
            "flower-supernode",
            *("--superlink", self.address, "--root-certificates", str(ca or self.ca)),
            *("--auth-supernode-private-key", str(key or self.folder / f"node-{number}")),
            *("--host", HOST, "--port", str(self._ports[number])),
            *("--node-config", f"partition-id={number} num-partitions={self.count} min-count=0"),
        )

    def wait_for_node(self, number: int) -> None:
        """Wait until SuperNode ``number`` is connected.

        Raises:
            RuntimeError: it ended instead; the message holds what it said.
        """
        for _ in self._while_alive(f"node-{number}", 60):
            if re.search(r"SuperNode ID: \d+", self.log(f"node-{number}")):
                return

    def revive_node(self, number: int) -> None:
        """Start a killed SuperNode again; its key is refused until the SuperLink has missed it for a minute."""
        for _ in range(30):
            self.start_node(number)
            try:
                self.wait_for_node(number)
                return
            except RuntimeError:
                time.sleep(3)
        raise RuntimeError(f"node {number} did not come back: {self.log(f'node-{number}')[-500:]}")

    def kill(self, name: str) -> None:
        """Kill ``superlink`` or ``node-K`` and all that runs below it, without warning."""
        for number in self.below(name):
            _signal(number, signal.SIGKILL)
        self._processes[name].wait()

    def below(self, name: str) -> set[int]:
        """Return the processes of ``superlink`` or ``node-K``: its own, and those started from it; none if it ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._processes[name].pid)
            return {first.pid, *(process.pid for process in first.children(recursive=True))}
        return set()

    def busy(self, number: int) -> bool:
        """Return whether SuperNode ``number`` is working on a message."""
        living = self.processes()
        return any("flwr-clientapp" in living.get(process, "") for process in self.below(f"node-{number}"))

    def flwr(self, *arguments: str) -> str:
        """Return what a ``flwr`` command prints.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [str(_BIN / "flwr"), *arguments], env=self._environment("home"), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def run_app(self, app: Path, **config: str | int) -> tuple[str, str]:
        """Run a Flower app to its end and return its status and its log."""
        options = [part for name, value in config.items() for part in ("--run-config", f"{name}={json.dumps(value)}")]
        number = str(json.loads(self.flwr("run", str(app), _CONNECTION, *options, "--format", "json"))["run-id"])
        log = self.flwr("log", number, _CONNECTION, "--stream")
        run = json.loads(self.flwr("list", "--run-id", number, _CONNECTION, "--format", "json"))["runs"][0]
        return str(run["status"]), log

    def log(self, name: str) -> str:
        """Return what ``superlink`` or ``node-K`` has printed since it was started last."""
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")

    def exit_code(self, name: str, timeout: float = 60) -> int:
        """Wait for a process to end and return its exit code."""
        return self._processes[name].wait(timeout)

    def stop(self) -> None:
        """End every process of the deployment, and those that they started."""
        for name in sorted(self._processes, key=lambda name: name == "superlink"):  # nodes first
            if self._processes[name].poll() is None:
                self._processes[name].terminate()
        for number, patience in ((None, 8), (signal.SIGTERM, 3), (signal.SIGKILL, 3)):
            for left in self.processes() if number else ():
                _signal(left, number)
            end = time.monotonic() + patience
            while time.monotonic() < end:
                # An ended process counts as alive for the children that watch it until it is waited for.
                running = [process for process in self._processes.values() if process.poll() is None]
                if not running and not self.processes():
                    return
                time.sleep(0.1)
        raise RuntimeError(f"processes are left behind: {self.processes()}")

    def processes(self) -> dict[int, str]:
        """Return the living processes of the deployment, by number, whoever started them."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile, or is another user's
                if process.environ().get(_TAG) == self._tag:
                    found[process.pid] = " ".join(process.cmdline())
        return found

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._environment(f"home-{name}"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the script, which ends them in order
            )

    def _environment(self, home: str) -> dict[str, str]:
        """Return the environment of a process: a home of its own, nothing fetched, nothing reported."""
        proxies = {name for name in os.environ if name.lower().endswith("_proxy")}
        return {name: value for name, value in os.environ.items() if name not in proxies} | {
            "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # it would fetch torch with CUDA
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            _TAG: self._tag,
        }

    def _while_alive(self, name: str, patience: float):
        """Yield every tenth of a second as long as a process lives."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self._processes[name].poll() is not None:
                raise RuntimeError(f"{name} ended with {self._processes[name].returncode}: {self.log(name)[-2000:]}")
            yield
            time.sleep(0.1)
        raise RuntimeError(f"{name} was not ready within {patience:g} s: {self.log(name)[-2000:]}")


def make_certificates(folder: Path) -> None:
    """Write ``ca.crt``, and ``server.crt`` with ``server.key`` for this machine; the CA's own key is not kept."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost", HOST)
    authority.cert_pem.write_to_path(folder / "ca.crt")
    server.cert_chain_pems[0].write_to_path(folder / "server.crt")
    _write_private(folder / "server.key", server.private_key_pem.bytes())


def make_node_key(path: Path) -> None:
    """Write the key by which a SuperNode is known, and ``PATH.pub``, which is registered with the SuperLink."""
    key = ec.generate_private_key(ec.SECP384R1())  # Flower takes NIST curves in OpenSSH's format
    private = serialization.PrivateFormat.OpenSSH
    _write_private(path, key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


def _write_private(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for own in sockets:
            own.bind((HOST, 0))
        return [own.getsockname()[1] for own in sockets]
    finally:
        for own in sockets:
            own.close()


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(process, number)
