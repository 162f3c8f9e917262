"""Which address and interface of this machine the other nodes reach it by.

Names are where multi-node launches break: a machine that resolves its own name to 127.0.1.1 (Debian's default) tells the others
to connect to themselves, and gloo binds to the interface of the host name, whichever that is. So nothing here asks for this
machine's name: the route to the rendezvous host decides.
"""

import ipaddress
import socket

import psutil

from ssa_cluster.errors import AddressProblem

ELSEWHERE = "192.0.2.1"  # of no machine (RFC 5737): its route is the default one


def resolve(host: str) -> str:
    """A numeric address of `host`, not a loopback one if there is a choice. Raises AddressProblem."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        problem = f"--host {host} cannot be resolved here: {error.strerror}; give an IP address"
        raise AddressProblem(problem, id="host-unresolved") from None
    return min(found, key=_is_loopback)


def own_address(host: str, *, hosting: bool, nodes: int) -> str:
    """This machine's address, as the other nodes may use it.

    `hosting`: this is the machine that `host` names, and `host` is by definition how the others reach it. Where its own name is a
    loopback address here (Debian's 127.0.1.1), it is the address of the default route instead: what others have for the name.
    Raises AddressProblem when there is none, or when `host` is another machine.
    """
    address = resolve(host)
    if hosting and nodes > 1 and _is_loopback(address) and not _says_loopback(host):
        try:
            return _source_towards(ELSEWHERE)
        except AddressProblem:
            raise AddressProblem(
                f"--host {host} is {address} on the machine itself, and no default route tells which of its addresses others "
                f"use: give one, of {', '.join(a for a in _interfaces() if not _is_loopback(a)) or 'none but loopback'}",
                id="host-is-loopback",
            ) from None
    if not hosting or _is_loopback(address):
        return _source_towards(address)
    if address not in _interfaces():
        raise AddressProblem(
            f"--host {host} is {address}, which is not an address of this machine (node rank 0 of {nodes}); "
            f"it has {', '.join(a for a in _interfaces() if not _is_loopback(a)) or 'none but loopback'}",
            id="host-elsewhere",
        )
    return address


def interface(address: str) -> str | None:
    """The network interface that has this address, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""
    return _interfaces().get(address)


def _source_towards(address: str) -> str:
    """The address that this machine's packets to `address` carry; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise AddressProblem(f"no route to {address}: {error.strerror}", id="no-route") from None
        return probe.getsockname()[0]


def _interfaces() -> dict[str, str]:
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _says_loopback(host: str) -> bool:
    """Whether somebody wrote loopback, and so means processes of one machine."""
    try:
        return _is_loopback(host)
    except ValueError:
        return host.partition(".")[0] == "localhost"
