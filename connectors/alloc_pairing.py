"""Which of a sender's runs go into which window at the receiver, so that both sides break at the same places.

A transfer needs one descriptor for each stretch that is consecutive on both sides. A window boundary at the
receiver that falls on a boundary of the sender's runs costs nothing; any other costs one descriptor more.
Windows therefore take whole runs, in any order, and cut one only where too little would fit otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from penstock.connectors.runs import Run


class Piece(NamedTuple):
    """``length`` blocks from position ``offset`` of the request's block list, one run at the sender."""

    offset: int
    length: int


def pieces_of(sender_runs: Iterable[Run], offset: int) -> list[Piece]:
    """The sender's runs as pieces, the first of which lies at ``offset``, longest first."""
    pieces = []
    for run in sender_runs:
        pieces.append(Piece(offset, run.length))
        offset += run.length
    return sorted(pieces, key=lambda piece: (-piece.length, piece.offset))


def fill_window(pieces: list[Piece], length: int, *, fullest_cut: float = 0.5) -> list[Piece]:
    """Take pieces for a window of ``length`` blocks out of ``pieces`` and return them.

    Whole pieces go in first, longest first. Only if they fill less than ``fullest_cut`` of the window is
    the longest remaining one cut to fill it. O(pieces).
    """
    chosen: list[Piece] = []
    rest: list[Piece] = []
    room = length
    for piece in pieces:
        if piece.length <= room:
            chosen.append(piece)
            room -= piece.length
        else:
            rest.append(piece)
    if rest and room > length * (1 - fullest_cut):
        longest = rest.pop(0)
        chosen.append(Piece(longest.offset, room))
        rest.append(Piece(longest.offset + room, longest.length - room))
        rest.sort(key=lambda piece: (-piece.length, piece.offset))
    pieces[:] = rest
    return chosen
