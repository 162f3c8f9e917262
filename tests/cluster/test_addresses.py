"""Which address a node gives to the others."""

import socket

from ssa_cluster import addresses
from ssa_cluster.addresses import interface, own_address, resolve
from ssa_cluster.errors import AddressProblem
from tests.errors import raises


def test_an_unknown_host_is_named():
    with raises(AddressProblem, "host-unresolved", "no-such-host.invalid"):
        resolve("no-such-host.invalid")


def test_a_node_uses_the_address_its_packets_carry():
    address = own_address("127.0.0.1", hosting=False, nodes=2)
    assert address == "127.0.0.1"
    assert interface(address) == "lo"


def test_the_host_of_the_rendezvous_must_have_the_address_it_is_reached_by():
    with raises(AddressProblem, "host-elsewhere", "192.0.2.1", "node rank 0 of 2"):
        own_address("192.0.2.1", hosting=True, nodes=2)


def test_a_node_whose_own_name_is_loopback_tells_the_others_the_address_of_its_default_route(monkeypatch):
    """Regression: the others got 127.0.1.1, Debian's default for a machine's own name, and waited for themselves."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(addresses, "_source_towards", lambda address: f"towards {address}")
    assert own_address("node0", hosting=True, nodes=2) == "towards 192.0.2.1"
    assert own_address("node0", hosting=True, nodes=1) == "towards 127.0.1.1"
    assert own_address("localhost", hosting=True, nodes=2) == "towards 127.0.1.1"

    def nowhere(address):
        raise AddressProblem(f"no route to {address}", id="no-route")

    monkeypatch.setattr(addresses, "_source_towards", nowhere)
    with raises(AddressProblem, "host-is-loopback", "node0", "127.0.1.1"):
        own_address("node0", hosting=True, nodes=2)


def test_of_several_addresses_of_a_name_the_one_others_can_reach_is_taken(monkeypatch):
    """Debian's /etc/hosts gives the machine's own name the address 127.0.1.1."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.1.1", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert resolve("node0") == "10.0.0.7"
