"""Write the Grafana dashboards in ``plugins/dashboards/`` from the rows below.

    python tools/make_dashboards.py [--check]

A panel is a title, a unit of Grafana's, and queries with their legends. Every query selects the servers that
the dashboard's variable chooses. A test holds the queries against the series that the code declares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dashboard_panels import (
    AT,
    TRANSFERS,
    Dashboard,
    Panel,
    as_json,
    gauge,
    grows,
    growth,
    of_clients,
    per_second,
    quantiles,
    share,
    totals,
)

FOLDER = Path(__file__).resolve().parent.parent / "plugins" / "dashboards"

FAULTS = (
    "num_failed_transfers",
    "num_failed_handshakes",
    "num_expired_leases",
    "num_stale_reads_refused",
    "num_digest_mismatches",
)

FLOWKV = Dashboard(
    "flowkv",
    "Penstock: FlowKV and the P/D proxy",
    TRANSFERS + "xfer_time_seconds_count",
    [
        quantiles("Transfer time", "s", TRANSFERS + "xfer_time_seconds", "Post included."),
        quantiles("Time to post", "s", TRANSFERS + "post_time_seconds"),
        quantiles("Descriptors a transfer", "short", TRANSFERS + "num_descriptors", "Few are expected."),
        quantiles("Bytes a transfer", "bytes", TRANSFERS + "bytes_transferred"),
        Panel(
            "Throughput of transfers",
            "Bps",
            [
                (
                    f"sum({grows(TRANSFERS + 'bytes_transferred_sum')})"
                    f" / sum({grows(TRANSFERS + 'xfer_time_seconds_sum')})",
                    "while transferring",
                )
            ],
        ),
        per_second("Faults", "cps", *(TRANSFERS + name for name in FAULTS)),
        per_second("Proxy: requests", "reqps", "penstock_proxy_requests", by="mode, status"),
        Panel(
            "Proxy: in flight",
            "short",
            [(gauge("penstock_proxy_in_flight", "role, server"), "{{role}} {{server}}")],
        ),
        Panel(
            "Proxy: healthy servers",
            "short",
            [(gauge("penstock_proxy_server_healthy", "role"), "{{role}}")],
        ),
        quantiles("Proxy: time to first token", "s", "penstock_proxy_ttft_seconds"),
        quantiles("Proxy: prefill", "s", "penstock_proxy_prefill_seconds"),
        quantiles("Proxy: decode", "s", "penstock_proxy_decode_seconds"),
        per_second(
            "Proxy: faults",
            "cps",
            "penstock_proxy_retries",
            "penstock_proxy_disconnects",
            "penstock_proxy_broken_streams",
            "penstock_proxy_prefills_without_handoff",
            "penstock_proxy_stranded_handoffs",
            "penstock_proxy_returned_handoffs",
        ),
    ],
)

REQUESTS = Dashboard(
    "request-scheduling",
    "Penstock: request scheduling",
    "penstock_clients_known",
    [
        of_clients("Service", "short", "penstock_client_service_tokens", "Weighted tokens since the start."),
        of_clients("Prompt tokens computed", "short", "penstock_client_extend_tokens"),
        of_clients("Tokens generated", "short", "penstock_client_output_tokens"),
        of_clients(
            "Standing",
            "short",
            "penstock_client_standing_tokens",
            "Deficit (dlpm, positive: may be served) or virtual counter (vtc).",
        ),
        of_clients("Waiting requests", "short", "penstock_client_waiting_requests"),
        Panel(
            "Jain index",
            "percentunit",
            [(f"penstock_client_jain_index{{{AT}}}", "{{instance}} {{engine}}")],
            "1 for equal parts.",
        ),
        Panel(
            "Clients",
            "short",
            [(gauge("penstock_clients_known", "engine, policy"), "{{policy}} {{engine}}")],
        ),
        Panel(
            "Features",
            "short",
            [(gauge("penstock_feature_info", "feature, state"), "{{feature}} {{state}}")],
            "How many processes say so.",
        ),
    ],
)


SLO = Dashboard(
    "slo",
    "Penstock: latency targets",
    "penstock_slo_plans",
    [
        Panel(
            "Attainment by tier",
            "percentunit",
            [(share("penstock_slo_attained_requests", "penstock_slo_requests", "tier"), "{{tier}}")],
            "Requests that met their targets, of those that ended.",
        ),
        Panel(
            "Attainment by tier, by tokens",
            "percentunit",
            [(share("penstock_slo_attained_tokens", "penstock_slo_tokens", "tier"), "{{tier}}")],
        ),
        Panel(
            "Goodput",
            "reqps",
            [(growth("penstock_slo_attained_requests", "tier"), "{{tier}}")],
            "Requests a second that met their targets.",
        ),
        Panel(
            "Step time, predicted to measured",
            "percentunit",
            [
                (
                    share("penstock_slo_predicted_seconds", "penstock_slo_measured_seconds", "engine"),
                    "{{engine}}",
                )
            ],
        ),
        Panel(
            "Error of predictions",
            "percentunit",
            [
                (f"penstock_slo_step_time_error_median{{{AT}}}", "P50 {{engine}}"),
                (f"penstock_slo_step_time_error_p99{{{AT}}}", "P99 {{engine}}"),
            ],
        ),
        totals("Steps", "cps", "plans", "passive_plans", "yielded_steps"),
        totals("Decisions on admission", "cps", "replans", "replans_past_work_bound"),
        totals("Requests", "cps", "admitted_requests", "demoted_requests", "preempted_requests", "skipped"),
        totals("Clock", "cps", "rejected_step_times", "clock_steps_back"),
    ],
)

DRAFTS = "penstock_draft_tokens_"

SPECULATION = Dashboard(
    "speculation",
    "Penstock: speculation",
    DRAFTS + "allocated",
    [
        totals(
            "Draft tokens",
            "cps",
            "allocated",
            "accepted",
            "wasted",
            "cut_off",
            of=DRAFTS,
            text="Verified, right, wrong, and not worth verifying.",
        ),
        Panel(
            "Accepted share",
            "percentunit",
            [(share(DRAFTS + "accepted", DRAFTS + "allocated", "engine"), "{{engine}}")],
            "Of the draft tokens that were verified.",
        ),
        totals("Probes", "cps", "probes", of="penstock_draft_", text="Steps that ask if drafts pay again."),
        Panel(
            "Error of predicted step times",
            "percentunit",
            [(f"penstock_step_time_error_ratio{{{AT}}}", "{{engine}}")],
            "Median, relative.",
        ),
    ],
)

SPARSE = "penstock_sparse_"

SPARSE_ATTENTION = Dashboard(
    "sparse-attention",
    "Penstock: sparse attention",
    SPARSE + "selections",
    [
        Panel(
            "Attained mass",
            "percentunit",
            [(f"{SPARSE}attained_mass{{{AT}}}", "quantile {{quantile}}, {{engine}}")],
            "Exact, of query heads that do not read everything, on samples.",
        ),
        Panel(
            "Pages read, by layer",
            "percentunit",
            [(share(SPARSE + "pages_read", SPARSE + "pages", "layer"), "layer {{layer}}")],
            "Of those of the steps in which pages were chosen.",
        ),
        totals("Selections and measurements", "cps", "selections", "measurements", of=SPARSE),
        Panel(
            "Dense all the same",
            "cps",
            [(growth(SPARSE + "dense_selections", "reason"), "{{reason}}")],
            "Layer and request in a step, by reason.",
        ),
        Panel(
            "Time a selection",
            "s",
            [
                (share(SPARSE + "selection_seconds", SPARSE + "selections", "engine"), "choosing"),
                (share(SPARSE + "measuring_seconds", SPARSE + "selections", "engine"), "measuring"),
            ],
        ),
        Panel(
            "Time a summary of a block",
            "s",
            [(share(SPARSE + "index_seconds", SPARSE + "index_blocks", "engine"), "{{engine}}")],
        ),
        Panel(
            "Memory of the index",
            "percentunit",
            [(f"{gauge(SPARSE + 'index_bytes')} / {gauge(SPARSE + 'cache_bytes')}", "{{engine}}")],
            "At most, to the KV cache of the layers that have an index.",
        ),
    ],
)

PREFIX = "penstock_shared_prefix_"

SHARED_PREFIXES = Dashboard(
    "shared-prefixes",
    "Penstock: shared prefixes",
    PREFIX + "steps",
    [
        Panel(
            "Blocks read",
            "percentunit",
            [(share(PREFIX + "blocks_read", PREFIX + "blocks", "engine"), "{{engine}}")],
            "Of those that requests have, a shared one once, in steps that shared.",
        ),
        Panel(
            "Runs a step",
            "short",
            [(share(PREFIX + "runs", PREFIX + "steps", "engine"), "{{engine}}")],
            "Of blocks that are read once for several requests.",
        ),
        totals("Decode steps", "cps", "steps", "stock_steps", of=PREFIX),
        Panel("Searches for shared blocks", "cps", [(growth(PREFIX + "searches", "engine"), "{{engine}}")]),
        Panel(
            "Time spent planning",
            "percentunit",
            [(growth(PREFIX + "planning_seconds", "engine"), "{{engine}}")],
            "Of all time.",
        ),
    ],
)

DASHBOARDS = (FLOWKV, REQUESTS, SLO, SPECULATION, SPARSE_ATTENTION, SHARED_PREFIXES)


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with ``--check`` say which ones are not what would be written."""
    stale = []
    for board in DASHBOARDS:
        file = FOLDER / f"{board.name}.json"
        text = as_json(board)
        if "--check" not in arguments:
            file.write_text(text)
        elif not file.exists() or file.read_text() != text:
            stale.append(file.name)
    if stale:
        print(f"run tools/make_dashboards.py: {', '.join(stale)}", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
