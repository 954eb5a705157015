"""What every test shares: shapes checked at run time, no network where asked for, a tiny model to paint with."""

import os
import socket
from typing import Any, NoReturn

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("ldm", "beartype.beartype")  # before the first import of ldm

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to connect a socket or to resolve a name raises."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
