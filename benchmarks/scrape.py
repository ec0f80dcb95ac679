"""Transfer statistics out of a decode server's ``/metrics``."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict
from typing import Self

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from penstock.benchmarks.processes import ServerError

PREFIXES = {"flowkv": "vllm:flowkv", "NixlConnector": "vllm:nixl"}
POLL_S = 0.2
ANSWER_S = 60.0


class Transfers(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over all transfers that a decode server has made."""

    count: int = 0
    descriptors: float = 0.0
    bytes: float = 0.0
    transfer_s: float = 0.0
    post_s: float = 0.0

    def __sub__(self, earlier: Self) -> Transfers:
        """What was added since ``earlier``."""
        return Transfers(
            count=self.count - earlier.count,
            descriptors=self.descriptors - earlier.descriptors,
            bytes=self.bytes - earlier.bytes,
            transfer_s=self.transfer_s - earlier.transfer_s,
            post_s=self.post_s - earlier.post_s,
        )

    def each(self, total: float) -> float | None:
        """Mean of a total over the transfers; None if there was none."""
        return total / self.count if self.count else None


def samples(url: str) -> dict[str, float]:
    """All samples of a Prometheus page by name, summed over their labels.

    Raises:
        ServerError: the server did not answer.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=ANSWER_S) as page:
            text = page.read().decode()
    except OSError as error:
        raise ServerError(f"{url}/metrics: {error}") from error
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                sums[sample.name] += sample.value
    return dict(sums)


def transfers(url: str, connector: str) -> Transfers:
    """What the decode server at ``url`` has pulled with ``connector`` so far."""
    found = samples(url)
    prefix = PREFIXES[connector]

    def total(name: str) -> float:
        return found.get(f"{prefix}_{name}_sum", 0.0)

    return Transfers(
        count=int(found.get(f"{prefix}_xfer_time_seconds_count", 0)),
        descriptors=total("num_descriptors"),
        bytes=total("bytes_transferred"),
        transfer_s=total("xfer_time_seconds"),
        post_s=total("post_time_seconds"),
    )


def settled(url: str, connector: str, *, quiet_s: float = 1.5, timeout_s: float = 20.0) -> Transfers:
    """As ``transfers``, once the count has not moved for ``quiet_s``: engines publish with a later step.

    After ``timeout_s`` whatever is known is returned. Rest is counted in looks, not by the clock: a machine
    that stands still between two looks has not seen the count rest.
    """
    deadline = time.monotonic() + timeout_s
    found = transfers(url, connector)
    looks = 0
    while looks * POLL_S < quiet_s and time.monotonic() < deadline:
        time.sleep(POLL_S)
        latest = transfers(url, connector)
        looks = looks + 1 if latest.count == found.count else 0
        found = latest
    return found
