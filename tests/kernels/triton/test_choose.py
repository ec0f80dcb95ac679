"""Lists of what is read against torch's top-p."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.triton import reference
from penstock.kernels.triton.choose import ReadLists, choose

INF = torch.inf


def run(device, logs, lengths, counts, wanted, *, unit=1, block=16, sinks=0, recent=1, others=None, **rest):
    """Logs [B, H, G, U] to lists; block ``p`` of request ``b`` is number ``100 * b + 7 * p``."""
    requests, heads, group, units = logs.shape
    pages = -(-units * unit // block)
    table = torch.arange(requests)[:, None] * 100 + 7 * torch.arange(pages)
    out = ReadLists.empty(requests * heads, group, units, device)
    given = (table.int(), torch.tensor(lengths), torch.tensor(counts))
    choose(
        logs.to(device), *(one.to(device, torch.int32) for one in given), torch.tensor([wanted],
        device=device), out, unit_tokens=unit, block_tokens=block, sink_units=sinks, recent_tokens=recent,
        others=None if others is None else others.to(device), **rest,
    )  # fmt: skip
    return table, ReadLists(*(getattr(out, name).cpu() for name in ReadLists.__slots__))


def check(logs, lengths, counts, wanted, table, found, *, unit=1, block=16, sinks=0, recent=1, others=None):
    requests, heads, _, units = logs.shape
    position = torch.arange(units)
    for row in range(requests * heads):
        request, head = divmod(row, heads)
        count = -(-lengths[request] // unit)
        tail = min(max(0, lengths[request] - recent) // unit, counts[request])
        kept = ((position < sinks) | (position >= tail))[:count]
        other = None if others is None else others[request, head]
        want = reference.chosen(logs[request, head, :, :count], kept, wanted, other)
        taken = found.taken[row, :count].bool()
        assert torch.equal(taken, want), (row, taken.sum(), want.sum())
        units_read = want.nonzero()[:, 0]
        tokens = units_read * unit
        numbers = table[request, tokens // block] * (block // unit) + tokens % block // unit
        assert torch.equal(found.entries[row, : len(units_read)].long(), numbers)
        spare = count * unit - lengths[request] if want.numel() and want[-1] else 0
        assert found.lengths[row] == len(units_read) * unit - spare
        left = logs[request, head, :, :count].masked_fill(want, -INF).logsumexp(-1)
        torch.testing.assert_close(found.left[row], left, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("group", "unit", "sharp", "wanted"),
    [(1, 1, 1.0, 0.5), (3, 16, 4.0, 0.95), (16, 16, 12.0, 0.8), (4, 16, 4.0, 1.0)],
)
def test_lists_are_those_of_torch(device, group, unit, sharp, wanted):
    generator = torch.Generator().manual_seed(group)
    logs = torch.randn(2, 1, group, 40, generator=generator) * sharp + 30
    lengths, counts = [39 * unit + 1, 7 * unit], [35, 7]
    how = {"unit": unit, "sinks": 1, "recent": 2 * unit}
    check(logs, lengths, counts, wanted, *run(device, logs, lengths, counts, wanted, **how), **how)


def test_more_units_than_a_program_holds_at_a_time(device):
    logs = torch.randn(1, 1, 16, 1300, generator=torch.Generator().manual_seed(1)) * 3
    table, found = run(device, logs, [1290], [1290], 0.8)
    check(logs, [1290], [1290], 0.8, table, found)


def test_what_ties_is_taken_from_the_front_and_no_more(device):
    _, found = run(device, torch.zeros(1, 1, 4, 40), [40], [40], 0.5)
    assert found.taken[0].nonzero()[:, 0].tolist() == [*range(19), 39]
    assert found.lengths.tolist() == [20]


def test_units_of_unknown_mass_and_broken_ones(device):
    logs = torch.zeros(1, 1, 2, 8)
    logs[..., :4] = -INF
    logs[0, 0, 1, 5], logs[0, 0, 0, 6] = torch.nan, INF
    others = torch.full((1, 1, 2), 3.0)
    _, found = run(device, logs, [8], [8], 0.9, others=others)
    assert found.taken[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    _, nothing = run(device, torch.full((1, 1, 2, 8), -INF), [8], [8], 0.9, recent=0)
    assert nothing.lengths.tolist() == [0]


def test_what_others_hold_counts_towards_the_whole(device):
    logs = torch.randn(1, 1, 3, 40, generator=torch.Generator().manual_seed(2))
    others = logs.logsumexp(-1)
    how = {"others": others}
    check(logs, [40], [40], 0.4, *run(device, logs, [40], [40], 0.4, **how), **how)


@pytest.mark.parametrize(
    ("how", "tokens"),
    [({"most_share": 0.3}, [629, 320]), ({"least_tokens": 630, "most_share": 0.6}, [629, 320])],
)
def test_dense_where_little_is_saved_or_the_context_is_short(device, how, tokens):
    logs = torch.zeros(2, 1, 4, 80)
    # The second request needs a quarter of its pages, and is long.
    logs[1, :, :, 20:] = -INF
    logs[1, :, :, 79] = 0.0
    _, found = run(device, logs, [629, 1280], [39, 80], 0.93, unit=16, **how)
    assert found.lengths.tolist() == tokens


def test_a_padded_request_reads_nothing(device):
    _, found = run(device, torch.zeros(2, 1, 4, 8), [0, 8], [0, 8], 0.5)
    assert found.lengths.tolist() == [0, 4]
    assert (found.left[0] == -INF).all()
