"""`trainer doctor`: network interfaces, and what names lead to. No torch."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Collection

from trainer.doctor import Check, Setting, listed, ok, problem, warning

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def interfaces(setting: Setting) -> list[Check]:
    """The interfaces that are up, and whether those that variables name exist."""
    import psutil

    up = {name: state for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = psutil.net_if_addrs()
    remedy = f"name one of: {', '.join(sorted(addresses))}"
    for variable in (GLOO, NCCL):
        if reason := unmatched(variable, os.environ.get(variable, ""), addresses):
            return problem("interfaces", f"{variable}: {reason}", remedy)
    shown = []
    for name, state in sorted(up.items()):
        own = [_plain(item.address) for item in addresses.get(name, ()) if item.family == socket.AF_INET]
        own = own or [_plain(item.address) for item in addresses.get(name, ()) if item.family == socket.AF_INET6]
        if own and not all(ipaddress.ip_address(address).is_loopback for address in own):
            shown.append(f"{name} {own[0]}{f' ({state.speed / 1000:g} Gbit/s)' if state.speed else ''}")
    if not shown:
        if _several_nodes(setting):
            return problem("interfaces", "none is up but loopback, on one of several nodes", "ip link; ip address")
        return ok("interfaces", "loopback only: enough for one machine")
    chosen = [f"{variable}={os.environ[variable]}" for variable in (GLOO, NCCL) if os.environ.get(variable)]
    return ok("interfaces", "; ".join([listed(shown), *chosen]))


def unmatched(variable: str, value: str, present: Collection[str]) -> str | None:
    """What a variable names that is not among the interfaces; None where every part of it leads to one.

    Gloo takes whole names; NCCL takes beginnings of names, `=` before whole names, and `^` before those to leave out.
    """
    names = [name.strip() for name in value.removeprefix("^").removeprefix("=").split(",") if name.strip()]
    if variable == GLOO:
        absent = [name for name in value.split(",") if name and name not in present]
        return f"there is no interface {' or '.join(absent)}" if absent else None
    exact, excluding = value.removeprefix("^").startswith("="), value.startswith("^")
    matching = {p for p in present for name in names if (p == name if exact else p.startswith(name))}
    left = set(present) - matching if excluding else matching
    return None if not names or left else f"no interface is left by {value}"


def names(setting: Setting) -> list[Check]:
    """Where this host's own name leads, and MASTER_ADDR where it is set."""
    host, several = socket.gethostname(), _several_nodes(setting)
    master = os.environ.get("MASTER_ADDR")
    if master:
        try:
            _addresses(master)
        except OSError as error:
            remedy = "set MASTER_ADDR to an address, or add the name to DNS or /etc/hosts on every node"
            return problem("names", f"MASTER_ADDR={master} does not resolve: {error.strerror or error}", remedy)
    remedy = f"give {host} its address in /etc/hosts or DNS, or set {GLOO} to the interface that the nodes share"
    try:
        found = _addresses(host)
    except OSError as error:
        text = f"{host}, this host's name, does not resolve: {error.strerror or error}"
        return problem("names", text, remedy) if several else warning("names", text, remedy)
    text = f"{host} is {listed(found)}"
    if all(ipaddress.ip_address(address).is_loopback for address in found):
        if several and not os.environ.get(GLOO):
            return warning("names", f"{text}: other nodes would be told to connect to themselves", remedy)
        text += ", this machine only"
    elif not set(found) & _own_addresses():
        return warning("names", f"{text}, which is no address of this machine", remedy)
    return ok("names", f"{text}; MASTER_ADDR={master} resolves" if master else text)


def _addresses(name: str) -> list[str]:
    """Raises OSError where the name leads nowhere."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted({_plain(str(entry[4][0])) for entry in found})


def _own_addresses() -> set[str]:
    import psutil

    return {_plain(item.address) for entries in psutil.net_if_addrs().values() for item in entries}


def _plain(address: str) -> str:
    return address.partition("%")[0]  # a link-local address is followed by its interface


def _several_nodes(setting: Setting) -> bool:
    """Whether something says that the job spans machines: the world, or the scheduler around this process."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    return setting.world.num_nodes > 1 or (nodes.isdecimal() and int(nodes) > 1)
