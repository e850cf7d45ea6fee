"""Who a client is, and which clients are fenced."""

import os
import socket
from pathlib import Path

import pytest

from nbdserver.identity import FENCES_MAX, Fences, Peer, check_client, peer_of
from objstore.errors import InvalidRequest


def test_a_certificate_comes_before_the_user_and_the_user_before_the_address() -> None:
    assert Peer("x", address="10.0.0.5").client == "address:10.0.0.5"
    assert Peer("x", address="10.0.0.5", certificate="host-a").client == "certificate:host-a"
    assert Peer("x", uid=0).client == "uid:0"
    assert Peer("x", uid=1000, certificate="host-a").client == "certificate:host-a"
    assert str(Peer("10.0.0.5:4711", address="10.0.0.5")) == "10.0.0.5:4711"


@pytest.mark.parametrize("family", ["unix", "ipv4", "ipv6"])
def test_the_peer_of_a_socket(tmp_path: Path, family: str) -> None:
    kinds = {"unix": socket.AF_UNIX, "ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
    places = {"unix": str(tmp_path / "s"), "ipv4": ("127.0.0.1", 0), "ipv6": ("::1", 0)}
    with socket.socket(kinds[family]) as listening, socket.socket(kinds[family]) as client:
        listening.bind(places[family])
        listening.listen()
        client.connect(listening.getsockname())
        accepted, address = listening.accept()
        with accepted:
            peer = peer_of(accepted, address)
    if family == "unix":
        assert peer.client == f"uid:{os.getuid()}"
        assert peer.label.startswith(f"unix:{tmp_path / 's'}#")
    else:
        assert peer.client == {"ipv4": "address:127.0.0.1", "ipv6": "address:::1"}[family]
        assert peer.label.startswith({"ipv4": "127.0.0.1:", "ipv6": "[::1]:"}[family])


@pytest.mark.parametrize("text", ["", "uid", "uid:", "uid:x", "uid:-1", "host:a", "7", "certificate:"])
def test_what_is_no_client(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no client"):
        check_client(text)


@pytest.mark.parametrize("text", ["uid:0", "address:::1", "certificate:a b:c"])
def test_what_is_a_client(text: str) -> None:
    assert check_client(text) == text


def test_fences_end_when_their_time_is_over_or_somebody_says_so() -> None:
    now = 100.0
    fences = Fences(lambda: now)
    fences.add("uid:1")
    fences.add("uid:2", 5.0)
    assert "uid:1" in fences
    assert "uid:2" in fences
    assert "uid:3" not in fences
    assert fences.seconds_left() == {"uid:1": None, "uid:2": 5.0}
    now = 105.0
    assert "uid:2" not in fences
    assert fences.seconds_left() == {"uid:1": None}
    assert not fences.remove("uid:2")
    assert fences.remove("uid:1")
    assert "uid:1" not in fences


def test_the_number_of_fences_is_bounded() -> None:
    now = 0.0
    fences = Fences(lambda: now)
    for number in range(FENCES_MAX):
        fences.add(f"uid:{number}", 1.0)
    fences.add("uid:0", 1.0)
    with pytest.raises(InvalidRequest, match="fenced"):
        fences.add("uid:x")
    now = 2.0
    fences.add("uid:x")
