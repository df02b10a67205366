from __future__ import annotations

import os
import socket

import pytest

from mlmesh_local import addresses
from mlmesh_runtime.errors import InvalidInput


def test_two_meshes_get_different_blocks_and_a_closed_one_is_free_again() -> None:
    first = addresses.claim("a folder")
    second = addresses.claim("a folder")
    try:
        assert first.block != second.block
        assert all(claim.block.second in addresses.BLOCKS for claim in (first, second))
    finally:
        second.close()
        first.close()
    again = addresses.claim("a folder")
    again.close()
    assert again.block == first.block


def test_a_block_whose_ports_are_taken_is_passed_over() -> None:
    claim = addresses.claim("another folder")
    claim.close()
    with socket.create_server((claim.block.control, addresses.OTLP_PORT)):
        other = addresses.claim("another folder")
        other.close()
    assert other.block != claim.block


def test_an_instance_has_five_addresses() -> None:
    instance = addresses.Block(second=77).instance(12)
    assert (instance.pod, instance.application, instance.outbound, instance.admin, instance.faults) == (
        "127.77.1.12",
        "127.77.2.12",
        "127.77.3.12",
        "127.77.4.12",
        "127.77.5.12",
    )


@pytest.mark.parametrize("number", [0, 251])
def test_more_instances_than_addresses_are_refused(number: int) -> None:
    with pytest.raises(InvalidInput):
        addresses.Block(second=77).instance(number)


def test_a_port_in_use_is_noticed_and_its_user_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not addresses.is_free("127.0.0.1", port)
        assert f"pid {os.getpid()}" in addresses.user_of(port)
    assert addresses.is_free("127.0.0.1", port)


@pytest.mark.parametrize("text", ["", "8443", "localhost", ":8443", "a:b", "a:-1", "a:70000"])
def test_half_an_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        addresses.split_address(text, field="--gateway-address")


def test_addresses_are_split() -> None:
    assert addresses.split_address("127.0.0.1:8443", field="x") == ("127.0.0.1", 8443)
    assert addresses.split_address("[::1]:8443", field="x") == ("::1", 8443)
