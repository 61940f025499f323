"""Which URLs may be opened for a dataset: http and https, to public addresses or to a host that the user named.

An entry of a dataset_info.json or of a catalogue may come from somebody else, and so may every redirect. A URL in it must not
make this machine fetch what only this machine can reach, such as a service of the local network or a cloud's metadata.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, unquote, urlsplit

Origin = tuple[str, int]  # host and port
PORTS = {"http": 80, "https": 443}
TRANSLATED = ip_network("64:ff9b::/96")  # IPv4 addresses behind a NAT64 gateway (RFC 6052)
# For names that a local proxy resolves, such as Clash in its fake-ip mode, it invents addresses from the range for benchmarks.
INVENTED = ip_network("198.18.0.0/15")


class AddressRefused(Exception):
    """Why a URL is not opened; the caller adds whose it is. `private_url` is the one that would be opened if it was typed."""

    def __init__(self, reason: str, private_url: str = "") -> None:
        super().__init__(reason)
        self.private_url = private_url


def url_problem(url: str) -> str:
    """What is wrong with a URL by itself, without asking for its address; empty if it may be opened."""
    if any(character.isspace() or ord(character) < 32 or character in '\\\x7f<>"' for character in url):
        return "a URL has no spaces, backslashes, quotes or control characters"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"it is not a URL ({error})"
    if parts.scheme.lower() not in PORTS:
        return f"{parts.scheme or 'no scheme'} is not read; legal: http and https"
    if not parts.hostname or port == 0:
        return "it has no host, or no legal port"
    if parts.username is not None or parts.password is not None:
        return "credentials in a URL are not sent; download the file yourself and type its path"
    return ""


def origin_of(url: str) -> Origin:
    """The host and port of a URL without problems."""
    parts = urlsplit(url)
    return (parts.hostname or "").rstrip("."), parts.port or PORTS[parts.scheme.lower()]


def trusted_origins(*typed: str) -> set[Origin]:
    """The hosts that the user named: those of typed URLs, and that of HF_ENDPOINT; they may have any address."""
    urls = [*typed, os.environ.get("HF_ENDPOINT", "")]
    return {origin_of(url) for url in urls if url and not url_problem(url)}


def name_in(url: str) -> str:
    """The name of the file in a URL, in lower case, to read its suffix from; it is never a path."""
    return unquote(urlsplit(url).path).replace("\\", "/").rpartition("/")[2].lower()


def checked_addresses(url: str, trusted: Collection[Origin], *, by_proxy: bool = False) -> list[str]:
    """The addresses of the URL's host, to which a connection may be made; raises AddressRefused, or OSError for an unknown name.

    They are numeric, so that the name cannot have another address when the connection is made. A name that only a proxy
    resolves has none.
    """
    if problem := url_problem(url):
        raise AddressRefused(problem)
    host, port = origin = origin_of(url)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or too long
        raise AddressRefused(f"{host[:80]!r} is not the name of a host") from None
    except OSError:
        if by_proxy:
            return []
        raise
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if origin in trusted:
        return addresses
    literal = _literal(urlsplit(url))
    private = [each for each in addresses if not is_public(each) and (literal or not _is_invented(each))]
    if private:
        what = private[0] if literal else f"{host} ({private[0]})"
        raise AddressRefused(f"{what} is an address of this machine or of a private network", private_url=url)
    return addresses


def check_literal_host(url: str, trusted: Collection[Origin]) -> None:
    """Raise AddressRefused for a host that may not be opened, as far as that is known without asking a name server."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    if _literal(parts) or host.rpartition(".")[2] == "localhost":
        try:
            checked_addresses(url, trusted)
        except OSError as error:
            raise AddressRefused(f"{host} has no address ({error})") from None


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet; an IPv6 address that stands for an IPv4 one is judged as that."""
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address):
        if inside := _ipv4_inside(parsed):
            return is_public(str(inside))
        if parsed.is_site_local:
            return False
    return parsed.is_global and not parsed.is_multicast


def _ipv4_inside(address: IPv6Address) -> IPv4Address | None:
    if address in TRANSLATED or int(address) >> 32 == 0:  # the latter are ::, ::1 and IPv4-compatible addresses
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_invented(address: str) -> bool:
    return ip_address(address) in INVENTED


def _literal(parts: SplitResult) -> bool:
    """Whether the host is an address in digits, in any form that the system's resolver reads, rather than a name."""
    host = (parts.hostname or "").rstrip(".")
    if ":" in host:
        return True
    try:
        socket.inet_aton(host)
    except (OSError, UnicodeError):
        return False
    return True
