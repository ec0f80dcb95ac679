"""Who asks, at the HTTP edge: headers, API keys and the body made into one set of extra arguments.

In order of authority: the table of API keys, the headers of a gateway where they are trusted, and the
request's own word, which does not count for client and weight where there is a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.schedulers.asking import (
    CLIENT_ID,
    TPOT_SLO_MS,
    TTFT_SLO_MS,
    WEIGHT,
    AskingError,
    asking,
    client_id,
    number_of,
    target_ms,
)
from penstock.schedulers.config import KeyedClient, SchedulerConfig

Headers = Sequence[tuple[bytes, bytes]]
"""As ASGI gives them: names in lower case."""

DIGEST_PREFIX = "sha256:"
CLIENT_HEADERS = ("x-llm-d-inference-fairness-id",)
TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
"""llm-d's names of today, then those before."""
HEX = frozenset("0123456789abcdef")


class Askers:
    """Decides who asks, for one server."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._clients = {digest_of(key): client for key, client in config.clients.items()}

    @property
    def has_table(self) -> bool:
        """Whether API keys say who asks, so that a request's own word does not count."""
        return bool(self._clients)

    def extra_args(self, headers: Headers, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given``, the ``vllm_xargs`` of a request, with what headers and API key say of it.

        Raises:
            AskingError: a value that counts is not allowed; it names the header or the key.
        """
        extra = dict(given)
        if self.has_table:
            extra.pop(CLIENT_ID, None)
            extra.pop(WEIGHT, None)
        if self._config.trust_headers:
            extra |= self._from_headers(headers)
        keyed = self._keyed(headers)
        if keyed is not None:
            extra |= _of_key(keyed)
        asking(extra, longest_client_id=self._config.longest_client_id)
        return extra

    def _from_headers(self, headers: Headers) -> dict[str, Any]:
        found: dict[str, Any] = {}
        name, text = only(headers, CLIENT_HEADERS)
        if text:
            found[CLIENT_ID] = client_id(name, text, self._config.longest_client_id)
        for key, names in ((TTFT_SLO_MS, TTFT_HEADERS), (TPOT_SLO_MS, TPOT_HEADERS)):
            name, text = only(headers, names)
            if text is not None:
                found[key] = target_ms(name, number_of(name, text))
        return found

    def _keyed(self, headers: Headers) -> KeyedClient | None:
        # The first one, as vLLM's own check of API keys takes it.
        value = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = value.partition(b" ")
        if not self._clients or scheme.lower() != b"bearer":
            return None
        return self._clients.get(hashlib.sha256(key).digest())


def _of_key(keyed: KeyedClient) -> dict[str, Any]:
    """What the table says of a key's requests."""
    said = {
        CLIENT_ID: keyed.client,
        WEIGHT: keyed.weight,
        TTFT_SLO_MS: keyed.ttft_slo_ms,
        TPOT_SLO_MS: keyed.tpot_slo_ms,
    }
    return {key: value for key, value in said.items() if value is not None}


def digest_of(key: str) -> bytes:
    """The SHA-256 digest that a key of the table stands for."""
    text = key.removeprefix(DIGEST_PREFIX).lower()
    if key.startswith(DIGEST_PREFIX) and len(text) == 64 and set(text) <= HEX:
        return bytes.fromhex(text)
    return hashlib.sha256(key.encode()).digest()


def only(headers: Headers, names: Sequence[str]) -> tuple[str, str | None]:
    """The first of ``names`` that is among ``headers``, and its value, or None.

    Raises:
        AskingError: it is there twice with different values; who sent which cannot be told.
    """
    for name in names:
        values = {value for header, value in headers if header == name.encode()}
        if len(values) > 1:
            raise AskingError(name, None, "one value, not several")
        if values:
            # Bytes beyond ASCII come out as they are, and are judged as text of any client is.
            return name, values.pop().decode("utf-8", "replace").strip()
    return names[0], None
