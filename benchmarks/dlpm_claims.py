"""What the outcomes of the DLPM bench amount to: one row a case, step time and policy, and the claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from penstock.benchmarks.dlpm_cases import QUANTUM, Case
from penstock.benchmarks.dlpm_run import Outcome, Task
from penstock.benchmarks.report import Cell, Claim

Results = Sequence[tuple[Task, Outcome]]
AGAIN, ENDLESS = "dlpm, again", "dlpm, endless quantum"
KV_READ = "+kv"
"""In the name of a step time with the KV-read term."""
ENOUGH_QUANTA = 20
"""Jain's index is claimed where every client got so many quanta in the mean while all waited. Below that, the
gap that any deficit policy allows is a large part of the service."""
NOISE = 1.1
"""Ratio of two P99 up to which they count as equal."""

Groups = dict[tuple[str, str], dict[str, list[Outcome]]]


def grouped(results: Results) -> Groups:
    """Outcomes of all seeds by (case, step time) and policy, in order of first appearance."""
    groups: Groups = {}
    for task, outcome in results:
        if task.label not in (AGAIN, ENDLESS):
            policies = groups.setdefault((task.case, task.step_time.name), {})
            policies.setdefault(task.label, []).append(outcome)
    return groups


def mean(outcomes: Sequence[Outcome], field: str) -> float:
    """Mean of a field over the seeds."""
    return statistics.fmean(getattr(outcome, field) for outcome in outcomes)


def mean_throughputs(results: Results) -> dict[tuple[str, str], dict[str, float]]:
    """Tokens a second by (case, step time) and policy."""
    return {
        key: {policy: mean(outcomes, "tokens_per_s") for policy, outcomes in policies.items()}
        for key, policies in grouped(results).items()
    }


def summary(results: Results) -> list[dict[str, Cell]]:
    """Means over the seeds; ``spread`` is the range of the throughput to its mean, ``gap`` the largest.

    ``jain`` is of extend tokens, of service (with output tokens twice) and of whole prompts; ``all wait`` the
    share of the time in which it is taken. TTFT is in seconds, of the clients that behave.
    """
    rows: list[dict[str, Cell]] = []
    for (case, step_time), policies in grouped(results).items():
        for policy, outcomes in policies.items():
            rates = [outcome.tokens_per_s for outcome in outcomes]
            rows.append(
                {
                    "case": case,
                    "kv_read": KV_READ in step_time,
                    "policy": policy,
                    "seeds": len(outcomes),
                    "requests": round(mean(outcomes, "requests")),
                    "tokens/s": round(mean(outcomes, "tokens_per_s")),
                    "spread": round((max(rates) - min(rates)) / statistics.fmean(rates), 3),
                    "hits": round(mean(outcomes, "hit_rate"), 3),
                    "jain ext": round(mean(outcomes, "jain_extend"), 3),
                    "jain serv": round(mean(outcomes, "jain_service"), 3),
                    "jain input": round(mean(outcomes, "jain_input"), 3),
                    "all wait": round(mean(outcomes, "backlogged_share"), 2),
                    "gap": round(max(outcome.gap for outcome in outcomes)),
                    "batch": round(max(outcome.batch for outcome in outcomes)),
                    "ttft p50": round(mean(outcomes, "p50_ttft_s"), 2),
                    "ttft p99": round(mean(outcomes, "p99_ttft_s"), 2),
                    "preempted": round(mean(outcomes, "preemptions")),
                }
            )
    return rows


def faults(results: Results) -> list[str]:
    """Every check that failed, with the run that failed it."""
    return [
        f"{task.case}, {task.step_time.name}, seed {task.seed}, {task.label}: {fault}"
        for task, outcome in results
        for fault in outcome.faults
    ]


def claims(results: Results, by_name: Mapping[str, Case]) -> list[Claim]:
    """All claims that the policies of this installation allow to be made."""
    found = [Claim.of("checks that failed, all runs", len(faults(results)), "==", 0)]
    found += digest_claims(results)
    groups = grouped(results)
    for plain in (True, False):
        part = {key: row for key, row in groups.items() if (KV_READ in key[1]) != plain and "dlpm" in row}
        title = "" if plain else "with KV read: "
        if part and all("vtc" in row for row in part.values()):
            found += throughput_claims(title, part, by_name)
            found += fairness_claims(title, part)
            found += flood_claims(title, part, by_name)
    return found


def digest_claims(results: Results) -> list[Claim]:
    """Equal runs are bit-equal, and DLPM that never refills serves as LPM does."""
    extra = {
        task.label: (task, outcome.digest) for task, outcome in results if task.label in (AGAIN, ENDLESS)
    }
    found = []
    for label, peer, name in (
        (AGAIN, "dlpm", "the same run twice is bit-equal"),
        (ENDLESS, "lpm", "with an endless quantum DLPM is LPM, bit for bit"),
    ):
        if label in extra:
            task, digest = extra[label]
            where = (task.case, task.seed, task.step_time.name)
            equal = [
                outcome.digest == digest
                for other, outcome in results
                if other.label == peer and (other.case, other.seed, other.step_time.name) == where
            ]
            found.append(Claim.of(name, float(all(equal)), "==", 1))
    return found


def throughput_claims(
    title: str, part: Mapping[tuple[str, str], dict[str, list[Outcome]]], by_name: Mapping[str, Case]
) -> list[Claim]:
    """Against VTC everywhere, against LPM where clients behave."""

    def ratio(key: tuple[str, str], peer: str) -> float:
        return mean(part[key]["dlpm"], "tokens_per_s") / mean(part[key][peer], "tokens_per_s")

    to_vtc = {key: ratio(key, "vtc") for key in part}
    local = [to_vtc[key] for key in part if by_name[key[0]].most_local]
    behave = [ratio(key, "lpm") for key in part if not by_name[key[0]].unruly and "lpm" in part[key]]
    found = []
    if len(part) > 1:
        center = math.exp(statistics.fmean(math.log(value) for value in to_vtc.values()))
        name = f"{title}throughput to VTC, geometric mean of {len(part)} workloads"
        found.append(Claim.of(name, center, ">=", 1.5))
    if local:
        found.append(Claim.of(f"{title}throughput to VTC, most local workload", min(local), ">=", 2.87))
    if behave:
        found.append(
            Claim.of(f"{title}throughput to LPM where clients behave, least", min(behave), ">=", 0.9)
        )
    return found


def fairness_claims(title: str, part: Mapping[tuple[str, str], dict[str, list[Outcome]]]) -> list[Claim]:
    """Equal service while all wait, and a bounded gap."""
    outcomes = [outcome for row in part.values() for outcome in row["dlpm"]]
    gap = max(outcome.gap / (2 * QUANTUM + outcome.batch) for outcome in outcomes)
    found = [Claim.of(f"{title}service gap to 2 quanta + running batch, largest", gap, "<=", 1)]
    enough = [o for o in outcomes if o.shared_service >= ENOUGH_QUANTA * QUANTUM]
    if enough:
        where = f"least of {len(enough)} of {len(outcomes)} runs"
        extend, service = min(o.jain_extend for o in enough), min(o.jain_service for o in enough)
        found.append(Claim.of(f"{title}Jain's index of extend tokens, {where}", extend, ">=", 0.99))
        found.append(Claim.of(f"{title}Jain's index of extend + 2 output, {where}", service, ">=", 0.99))
    return found


def flood_claims(
    title: str, part: Mapping[tuple[str, str], dict[str, list[Outcome]]], by_name: Mapping[str, Case]
) -> list[Claim]:
    """P99 of the time to first token of the clients that behave, under a flood."""
    found = []
    for (case, _), row in part.items():
        if by_name[case].flood:
            own = mean(row["dlpm"], "p99_ttft_s")
            for peer in ("lpm", "fcfs"):
                if peer in row:
                    value = mean(row[peer], "p99_ttft_s") / own
                    found.append(Claim.of(f"{title}flood: P99 TTFT of {peer} to DLPM's", value, ">=", 3))
            value = own / mean(row["vtc"], "p99_ttft_s")
            found.append(Claim.of(f"{title}flood: P99 TTFT of DLPM to VTC's", value, "<=", NOISE))
    return found
