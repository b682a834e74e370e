"""The example app as it is deployed: SuperLink and SuperNodes as processes, over TLS, and one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from quickstart_case import EXAMPLE, quickstart

from command_line import run
from keyhole.experiment.transcript import read_transcript

pytestmark = pytest.mark.slow

PEM = serialization.Encoding.PEM
PROGRAMS = Path(sys.executable).parent
PATIENCE = 300.0
"""Most seconds that any one step may take; SuperLink gives a silent node up to 60."""


def certificates(folder: Path) -> None:
    """An authority of our own, ``ca.pem``, and what it says of this machine, ``server.pem``."""
    signer = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    for file, authority in (("ca", True), ("server", False)):
        own = signer if authority else ec.generate_private_key(ec.SECP256R1())
        made = (
            x509.CertificateBuilder()
            .subject_name(issuer if authority else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]))
            .issuer_name(issuer)
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(minutes=5))
            .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            made = made.add_extension(names, critical=False)
        (folder / f"{file}.pem").write_bytes(made.sign(signer, hashes.SHA256()).public_bytes(PEM))
        key = own.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{file}.key").write_bytes(key)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that systems give to connections: they are needed only later."""
    found: list[int] = []
    for port in range(10_000 + os.getpid() % 20_000, 32_768):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no ports")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, as when a machine loses its power."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in listed.splitlines())}
    doomed = [process.pid]
    for one in doomed:
        doomed += [pid for pid, parent in parents.items() if parent == one]
    if process.poll() is None:  # else its number may be another's by now
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait()


def until(true: Callable[[], bool], what: str, *processes: subprocess.Popen[bytes], logs: Path) -> None:
    """Wait; when a process that is needed ends first, or it takes too long, the logs say why."""
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > PATIENCE or any(one.poll() is not None for one in processes):
            told = "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(logs.glob("*.log")))
            pytest.fail(f"{what} did not happen:\n{told}")
        time.sleep(0.1)


class Deployment(NamedTuple):
    """What is left of the run."""

    folder: Path
    code: int
    said: str
    survivor: str
    dead: str
    replacement: str
    trusted: str
    distrusted: str


def handshake(port: int, roots: Path | None) -> str:
    """The protocol that SuperLink's port speaks, or why there is no connection."""
    context = ssl.create_default_context(cafile=roots)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return str(secure.version())
    except ssl.SSLCertVerificationError as error:
        return error.verify_message


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two rounds; a client is killed in the first, and another one takes its place."""
    folder = tmp_path_factory.mktemp("deployment")
    certificates(folder)
    link, *own = free_ports(4)
    source = str(EXAMPLE.parents[1] / "src")
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        # SuperLink and SuperNode start programs of Flower by their names.
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
    }
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink.deployment]\naddress = "localhost:{link}"\nroot-certificates = "{folder / "ca.pem"}"\n'
    )

    with ExitStack() as stack:
        stack.enter_context(quickstart(folder / "app", "defend", "record"))
        (folder / "app" / "pyproject.toml").write_text((EXAMPLE / "pyproject.toml").read_text())

        def start(log: str, program: str, *arguments: Any, where: Path = folder) -> subprocess.Popen[bytes]:
            with (folder / log).open("wb") as file:
                process = subprocess.Popen(
                    [str(PROGRAMS / program), *map(str, arguments)],
                    cwd=where,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            stack.callback(end, process)
            return process

        def join(log: str, partition: int, port: int) -> subprocess.Popen[bytes]:
            whose = f"partition-id={partition} num-partitions=2"
            link_to = ("--superlink", f"localhost:{link}", "--root-certificates", "ca.pem")
            return start(log, "flower-supernode", *link_to, "--port", port, "--node-config", whose)

        def reads(log: str, words: str) -> Callable[[], bool]:
            return lambda: words in (folder / log).read_text()

        def number(log: str) -> str:
            return (folder / log).read_text().partition("SuperNode ID: ")[2].split()[0]

        server = start(
            "superlink.log",
            "flower-superlink",
            *("--ssl-ca-certfile", "ca.pem", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"),
            *("--port", link, "--disable-runtime-dependency-installation"),
        )
        nodes = [join(f"node{i}.log", i, own[i]) for i in range(2)]
        for i in range(2):
            until(reads(f"node{i}.log", "SuperNode ID: "), "joining", server, *nodes, logs=folder)
        speaks = handshake(link, folder / "ca.pem"), handshake(link, None)

        # Its name counts from where SuperLink was started.
        settings = 'rounds=2 images=8 batch-size=8 local-epochs=1 transcript="transcript"'
        command = ("run", ".", "deployment", "--run-config", settings, "--stream")
        run = start("run.log", "flwr", *command, where=folder / "app")
        until(reads("node1.log", "Start `flwr-clientapp` process"), "training", server, run, *nodes, logs=folder)
        end(nodes[1])
        nodes[1] = join("node2.log", 1, own[2])
        until(lambda: run.poll() is not None, "the end of the run", server, *nodes, logs=folder)
        said = (folder / "run.log").read_text()
        yield Deployment(folder, run.returncode, said, *map(number, ("node0.log", "node1.log", "node2.log")), *speaks)


def test_superlink_speaks_tls_and_is_believed_only_by_those_who_have_its_authority(deployment: Deployment) -> None:
    assert deployment.trusted == "TLSv1.3"
    assert "unable to get local issuer certificate" in deployment.distrusted


def test_the_run_goes_on_after_a_client_was_killed(deployment: Deployment) -> None:
    assert deployment.code == 0, deployment.said
    assert "Received 1 results and 1 failures" in deployment.said
    assert "Received 2 results and 0 failures" in deployment.said
    assert "Strategy execution finished" in deployment.said


def test_the_transcript_is_whole_and_says_who_died(deployment: Deployment) -> None:
    folder = deployment.folder / "transcript"
    from quickstart.model import Net

    found = read_transcript(folder, Net())
    assert {(one.round, one.client) for one in found.updates} == {
        (1, deployment.survivor),
        (2, deployment.survivor),
        (2, deployment.replacement),
    }
    (missing,) = found.missing
    assert missing.startswith(f"round 1, client {deployment.dead}: the reply is an error: ")
    assert "Node Unavailable" in missing and "stopped" not in found.about
    assert {one.examples for one in found.updates} == {8}
    for one in found.updates:
        # Without noise each column's sum over the classes is 0: there softmax sums to what the label does.
        assert one.update["fc2.weight"].sum(0).norm() > 1e-3, "the defense was not applied"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.*")} == {0o600}


def test_the_transcript_can_be_audited(deployment: Deployment) -> None:
    out = deployment.folder / "out"
    attack = 'attacks=[{name="inverting_gradients",steps=30,restarts=1}]'
    command = ("--transcript", deployment.folder / "transcript", "--model", "quickstart.model:Net", "--out", out)
    assert run("audit", *command, "--set", attack) == 0
    report = json.loads((out / "report.json").read_text())
    assert len(report["updates"]) == report["recorded"] == 3
    assert deployment.dead in report["without_update"][0]
    assert {one["images"] for one in report["updates"]} == {8}
    assert all(attack["score"] < 1 for one in report["updates"] for attack in one["attacks"])
