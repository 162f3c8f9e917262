"""Which address a node gives to the others."""

import socket

import pytest

from cluster.addresses import AddressProblem, interface, own_address, resolve


def test_an_unknown_host_is_named():
    with pytest.raises(AddressProblem, match=r"--host no-such-host\.invalid cannot be resolved"):
        resolve("no-such-host.invalid")


def test_a_node_says_the_address_its_packets_carry():
    address = own_address("127.0.0.1", hosting=False, nodes=2)
    assert address == "127.0.0.1"
    assert interface(address) == "lo"


def test_the_host_of_the_rendezvous_must_have_the_address_it_is_reached_by():
    with pytest.raises(AddressProblem, match=r"192\.0\.2\.1, which is no address of this machine \(node rank 0 of 2\)"):
        own_address("192.0.2.1", hosting=True, nodes=2)


def test_of_several_addresses_of_a_name_the_one_others_can_reach_is_taken(monkeypatch):
    """Debian's /etc/hosts gives the machine's own name the address 127.0.1.1."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.1.1", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert resolve("node0") == "10.0.0.7"
