"""Transfer statistics out of a decode server's ``/metrics``."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from typing import Self

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

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
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in _samples(url):
        if not sample.name.endswith(("_bucket", "_created")):
            sums[sample.name] += sample.value
    return dict(sums)


def by_label(url: str, name: str, label: str) -> dict[str, float]:
    """The samples of one series by the value of one label, as in ``samples``."""
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in _samples(url):
        if sample.name == name:
            sums[sample.labels[label]] += sample.value
    return dict(sums)


def _samples(url: str) -> Iterator[Sample]:
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=ANSWER_S) as page:
            text = page.read().decode()
    except OSError as error:
        raise ServerError(f"{url}/metrics: {error}") from error
    for family in text_string_to_metric_families(text):
        yield from family.samples


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
