from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from penstock.benchmarks.processes import ServerError
from penstock.benchmarks.scrape import Transfers, samples, settled, transfers

PAGE = """\
# HELP vllm:nixl_num_descriptors Descriptors of a transfer.
# TYPE vllm:nixl_num_descriptors histogram
vllm:nixl_num_descriptors_bucket{{engine="0",le="10.0"}} 1.0
vllm:nixl_num_descriptors_bucket{{engine="0",le="+Inf"}} {count}
vllm:nixl_num_descriptors_count{{engine="0"}} {count}
vllm:nixl_num_descriptors_sum{{engine="0"}} 400.0
vllm:nixl_num_descriptors_created{{engine="0"}} 1.7e9
# TYPE vllm:nixl_xfer_time_seconds histogram
vllm:nixl_xfer_time_seconds_bucket{{engine="0",le="+Inf"}} {count}
vllm:nixl_xfer_time_seconds_count{{engine="0"}} {count}
vllm:nixl_xfer_time_seconds_sum{{engine="0"}} 0.5
# TYPE vllm:nixl_bytes_transferred histogram
vllm:nixl_bytes_transferred_bucket{{engine="0",le="+Inf"}} {count}
vllm:nixl_bytes_transferred_count{{engine="0"}} {count}
vllm:nixl_bytes_transferred_sum{{engine="0"}} 8192.0
# TYPE vllm:request_success counter
vllm:request_success_total{{engine="0",finished_reason="stop"}} 2.0
vllm:request_success_total{{engine="0",finished_reason="length"}} 3.0
"""


class Metrics(http.server.ThreadingHTTPServer):
    """Serves ``PAGE``; the count takes the next value at every request and keeps the last one."""

    def __init__(self) -> None:
        self.counts = [4]
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Metrics

    def do_GET(self) -> None:
        counts = self.server.counts
        body = PAGE.format(count=float(counts.pop(0) if len(counts) > 1 else counts[0])).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    with Metrics() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_samples_add_up_over_labels_and_leave_buckets_out(metrics):
    found = samples(metrics.url)
    assert found["vllm:request_success_total"] == 5.0
    assert found["vllm:nixl_num_descriptors_sum"] == 400.0
    assert not [name for name in found if name.endswith(("_bucket", "_created"))]


def test_transfers_of_a_connector_that_has_none_are_zero(metrics):
    assert transfers(metrics.url, "flowkv") == Transfers()


def test_transfers_are_sums_and_differences_are_taken_field_by_field(metrics):
    found = transfers(metrics.url, "NixlConnector")
    assert found == Transfers(count=4, descriptors=400.0, bytes=8192.0, transfer_s=0.5, post_s=0.0)
    assert (found - Transfers(count=1, bytes=192.0)).bytes == 8000.0
    assert found.each(found.descriptors) == 100.0
    assert Transfers().each(1.0) is None


def test_settled_waits_until_the_count_rests(metrics):
    metrics.counts = [4, 5, 5, 9, 9]
    assert settled(metrics.url, "NixlConnector", quiet_s=0.5).count == 9


def test_settled_gives_up_at_its_time_limit(metrics):
    metrics.counts = list(range(1000))
    assert settled(metrics.url, "NixlConnector", quiet_s=60.0, timeout_s=0.3).count < 1000


def test_a_server_that_is_gone_is_an_error():
    with pytest.raises(ServerError, match="/metrics"):
        samples("http://127.0.0.1:9")
