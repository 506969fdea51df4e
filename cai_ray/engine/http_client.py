"""The HTTP client of an endpoint: its key, its limits, and which proxy it goes through."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from cai_ray.config.engine import EngineConfig
from cai_ray.errors import InputError

_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")


def is_on_this_machine(url: str) -> bool:
    """Whether an address is a loopback address: `localhost`, 127.0.0.0/8 or ::1, or 0.0.0.0, which leads there; or
    this machine by its own name."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host in (*_NAMES, socket.gethostname().casefold()) or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        try:  # short forms, such as 127.1
            address = ip_address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def make_client(config: EngineConfig, key: str) -> Any:
    """The client (`httpx2.AsyncClient`) that asks an endpoint.

    It goes through the proxies of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, except for NO_PROXY), but never
    to reach this machine.

    Raises:
        InputError: the environment names a proxy that cannot be used.
    """
    import httpx2

    limits = httpx2.Limits(max_connections=config.max_num_seqs)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    # A transport of one's own is used without a look at the proxies.
    here = is_on_this_machine(str(config.base_url))
    try:
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(config.timeout_s, connect=min(10.0, config.timeout_s), pool=None),
            limits=limits,
            transport=httpx2.AsyncHTTPTransport(limits=limits) if here else None,
        )
    except (ImportError, ValueError, httpx2.InvalidURL):  # they repeat the address, which may hold a password
        raise InputError(
            f"endpoint {config.base_url}: the environment names a proxy that cannot be used (HTTP_PROXY, HTTPS_PROXY "
            "or ALL_PROXY); give http://host:port, or name the endpoint's host in NO_PROXY"
        ) from None
