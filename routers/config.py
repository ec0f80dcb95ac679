"""The proxy's configuration: one frozen struct, checked when it is built."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import msgspec

Engine = Literal["vllm", "sglang"]


class ConfigError(ValueError):
    """A value that the proxy cannot run with; the message says which, what was given and what is allowed."""


class ProxyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of the prefill/decode proxy. Durations are in seconds, sizes in bytes.

    Raises:
        ConfigError: no server for a role, a URL that is not a server's root, or a number out of range.
    """

    prefill: tuple[str, ...]
    """Root URLs of the prefill servers, such as ``http://10.0.0.1:8000``."""
    decode: tuple[str, ...]
    """Root URLs of the decode servers."""
    engine: Engine | Literal["auto"] = "auto"
    """What the servers are; ``auto`` asks them."""
    bootstrap_ports: dict[str, int] = {}
    """Of SGLang's prefill servers, by root URL; a server that is not named here is asked."""
    host: str = "127.0.0.1"
    """Address that the proxy listens on."""
    port: int = 8080
    """TCP port that the proxy listens on; 0 lets the system choose a free one."""
    max_body_bytes: int = 64 << 20
    """Largest request body; a longer one is answered with 413."""
    max_choices: int = 1024
    """Most answers that one request may ask for (prompts times ``n``); more are answered with 400."""
    split_concurrency: int = 32
    """How many parts of one split request (several prompts, or ``n`` above 1) are under way at a time."""
    body_timeout_s: float = 60.0
    """How long a client may take to send its body."""
    connect_timeout_s: float = 5.0
    """How long opening a connection to a server may take."""
    prefill_timeout_s: float = 600.0
    """How long a prefill server may take to answer, its queue included."""
    first_byte_timeout_s: float = 600.0
    """How long a decode server may take until the first byte of its answer, its queue included."""
    idle_timeout_s: float = 600.0
    """Longest pause between two chunks of an answer."""
    drain_timeout_s: float = 60.0
    """How long requests in flight may go on after SIGTERM."""
    probe_interval_s: float = 5.0
    """Interval at which a healthy server's ``/health`` is asked."""
    probe_timeout_s: float = 5.0
    """How long an answer of ``/health`` may take."""
    backoff_base_s: float = 0.25
    """First interval at which a server that was put aside is probed again; it doubles with each failure."""
    backoff_max_s: float = 10.0
    """Longest interval between probes of a server that was put aside."""

    def __post_init__(self) -> None:
        for role, urls in (("prefill", self.prefill), ("decode", self.decode)):
            if not urls:
                raise ConfigError(
                    f"no {role} server: give at least one, --{role} http://HOST:PORT (for a single server "
                    "without prefill/decode separation no proxy is needed)"
                )
            for url in urls:
                check_url(url, f"--{role}")
        seen: set[str] = set()
        for url in (*self.prefill, *self.decode):
            if url in seen:
                raise ConfigError(f"{url} is given twice: a server has one role and is named once")
            seen.add(url)
        for url, port in self.bootstrap_ports.items():
            if url not in self.prefill or not 1 <= port <= 65535:
                raise ConfigError(
                    f"bootstrap port {port} of {url}: allowed is 1 to 65535, of a prefill server"
                )
            if self.engine == "vllm":
                raise ConfigError(f"{url} has a bootstrap port, {port}, which vLLM's servers do not know")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, allowed is 0 to 65535")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name == "drain_timeout_s" and value == 0:
                continue
            if name != "port" and isinstance(value, int | float) and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}, allowed is a finite number above 0")


def check_url(url: str, name: str) -> None:
    """Accept ``http(s)://host[:port][/prefix]`` without a trailing slash.

    Raises:
        ConfigError: anything else; ``name`` tells which option held it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{name} {url!r}: {error}") from None
    wrong = None
    if parts.scheme not in ("http", "https"):
        wrong = "it must start with http:// or https://"
    elif not parts.hostname or any(c.isspace() or not c.isprintable() for c in url):
        wrong = "it names no host"
    elif port == 0:
        wrong = "port 0 is not a server"
    elif parts.username is not None or parts.query or parts.fragment:
        wrong = "it must be a server's root, without user, query or fragment"
    elif parts.path.rstrip("/").endswith("/v1"):
        wrong = "give the server's root, without /v1"
    elif url.endswith("/"):
        wrong = "leave out the trailing slash"
    if wrong:
        raise ConfigError(f"{name} {url!r}: {wrong}")


def split_urls(values: tuple[str, ...]) -> tuple[str, ...]:
    """Flatten comma-separated and repeated option values, trailing slashes dropped."""
    return tuple(url.strip().rstrip("/") for value in values for url in value.split(",") if url.strip())


def split_prefill(values: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, int]]:
    """As ``split_urls``; a number after a URL, ``http://a:8000,8998``, is that server's bootstrap port."""
    urls: list[str] = []
    ports: dict[str, int] = {}
    for item in split_urls(values):
        if item.isdecimal() and urls and urls[-1] not in ports:
            ports[urls[-1]] = int(item)
        else:
            urls.append(item)
    return tuple(urls), ports
