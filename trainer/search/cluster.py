"""The Ray cluster of a search: an own local one, or one that is there; and how many trials it can run at once."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainer.errors import TrainerError, UserError
from trainer.search.channel import Message
from trainer.search.guardian import VARIABLE, Guardian
from trainer.search.nursery import Nursery

STORE_BYTES = 96 << 20
"""Object store of a local Ray: only messages pass through it, and its default is a third of the memory."""
QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": logging.ERROR}
KNOCK_SECONDS = 5.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@dataclass(frozen=True)
class Need:
    """What one trial takes, on one node."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Node:
    """A node that is alive, with what it has."""

    name: str
    cpus: float
    gpus: float

    def places(self, need: Need) -> int:
        """How many trials it can run at once."""
        by_cpu = int((self.cpus + 1e-6) // need.cpus)
        return min(by_cpu, int((self.gpus + 1e-6) // need.gpus)) if need.gpus else by_cpu


@contextmanager
def connected(address: str | None, setup: Message | None = None) -> Iterator[None]:
    """Ray within the block: started on this machine and ended with it, or the cluster at `address`.

    `setup` is what workers are told; a local Ray's learn from it where to get their hosts. Raises UserError where there
    is no cluster at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        with _local(setup):
            yield
        return
    import ray

    try:
        _join(address)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local(setup: Message | None) -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="trainer-ray-")  # short: Ray puts sockets there, and we one
    mark = secrets.token_hex(16)
    guardian = Guardian(mark, folder)
    nursery = None
    try:
        if setup is not None:
            nursery = Nursery(setup, folder, {VARIABLE: mark})
            setup["nursery"] = nursery.socket
        import ray

        try:
            _start(folder, mark)
            yield
        finally:
            ray.shutdown()
    finally:
        if nursery is not None:
            nursery.close()
        guardian.close()


def _join(address: str) -> None:
    import ray

    if address.startswith("ray://"):
        raise UserError(f"--address {address}: start the search on a node of the cluster, with --address auto")
    try:
        _knock(address)
        ray.init(address=address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--address {address}: there is no Ray cluster ({why[:200]}); start one with `ray start`"
        ) from None


def _knock(address: str) -> None:
    """OSError where nobody listens at `host:port`: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def _start(folder: str, mark: str) -> None:
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    os.environ[VARIABLE] = mark
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _temp_dir=folder,
            **QUIET,
        )
    except (RuntimeError, ValueError, OSError, TimeoutError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise TrainerError(
            f"a local Ray could not be started ({why[:300]}); `trainer doctor` looks at this machine"
        ) from error
    finally:
        del os.environ[VARIABLE]


def nodes() -> list[Node]:
    """Nodes that are alive."""
    import ray

    return [
        Node(
            str(entry.get("NodeManagerHostname") or entry["NodeID"]),
            float(entry["Resources"].get("CPU", 0.0)),
            float(entry["Resources"].get("GPU", 0.0)),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def places(found: Sequence[Node], need: Need) -> int:
    """How many trials the nodes can run at once. UserError where none can run even one."""
    count = sum(node.places(need) for node in found)
    if count == 0:
        raise UserError(_too_much(found, need))
    return count


def _too_much(found: Sequence[Node], need: Need) -> str:
    """A trial runs on one node: the line for one that fits on none."""
    gpus, cpus = (max((getattr(node, what) for node in found), default=0.0) for what in ("gpus", "cpus"))
    if need.gpus > gpus:
        return (
            f"--gpus-per-trial {need.gpus:g}: no node of the cluster has so many, the largest has {gpus:g}; "
            "a trial runs on one node"
        )
    if need.cpus > cpus:
        return (
            f"--cpus-per-trial {need.cpus:g}: no node of the cluster has so many, the largest has {cpus:g}; "
            "a trial runs on one node"
        )
    return (
        f"--cpus-per-trial {need.cpus:g} and --gpus-per-trial {need.gpus:g}: no node of the cluster has both "
        f"({', '.join(f'{node.name}: {node.cpus:g} CPUs and {node.gpus:g} GPUs' for node in found)})"
    )
