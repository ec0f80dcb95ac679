"""The running batch by what each request needs of the step that is planned."""

from __future__ import annotations

from collections.abc import Container, Iterable, Set
from dataclasses import dataclass, field

import numpy as np

from penstock.schedulers.slo.decodes import COMPUTED, DRAFTED, LAST, TPOT, Column, Columns, Mask, RunningBatch
from penstock.schedulers.slo.pacing import Pacing
from penstock.schedulers.slo.requests import Running

SPARE_S = 0.001
"""How much earlier than due a decode is planned: predictions are a little off either way (SLOs-Serve takes
as much from each time per token)."""

Entry = tuple[float, str, Running]


@dataclass(slots=True)
class Paced:
    """Decodes under targets. ``guarded`` ones can still meet their deadlines and bound the step's length, the
    others are late and keep their pace; ``time_s`` is how long after the start of the step either's next
    token may come. Whatever that says, the step may last ``lent_s`` for prompts that have targets."""

    columns: Columns
    time_s: Column
    guarded: Mask
    lent_s: float = 0.0

    @classmethod
    def of(cls, columns: Columns, start_s: float, late_tpots: float, pacing: Pacing) -> Paced:
        """All that ``columns`` hold."""
        tpot_s, last_s = columns.values[TPOT], columns.values[LAST]
        slack_s = pacing.slacks_s(columns, start_s) - SPARE_S
        lent_s = pacing.lent_s(columns, slack_s)
        # Without 0 times infinity.
        guarded = slack_s >= (-late_tpots * tpot_s if late_tpots else 0.0)
        if not guarded.all():
            paced_s = np.where(np.isnan(last_s), start_s, last_s) + tpot_s - start_s
            slack_s = np.where(guarded, slack_s, paced_s)
        return cls(columns, slack_s, guarded, lent_s)

    def by_turn(self, chosen: Mask) -> list[int]:
        """Places of those ``chosen``: guarded before late, each by time, at one time by id."""
        by_id = sorted(np.flatnonzero(chosen).tolist(), key=self.columns.names.__getitem__)
        places = np.array(by_id, np.int64)
        found: list[int] = places[np.lexsort((self.time_s[places], ~self.guarded[places]))].tolist()
        return found

    def names_by_turn(self, *, guarded: bool) -> list[str]:
        """Ids of the guarded, or of the late, in the order in which they are served."""
        names = self.columns.names
        return [names[place] for place in self.by_turn(self.guarded == guarded)]


@dataclass(slots=True)
class Needs:
    """Running requests by need. ``prefills`` have targets in reach and their slack in seconds from the start
    of the step; what neither they nor ``paced`` hold is best effort. ``names`` are all, as they run."""

    names: tuple[str, ...]
    paced: Paced
    running: RunningBatch
    prefills: list[Entry] = field(default_factory=list)
    best_decodes: list[Entry] = field(default_factory=list)
    best_prefills: list[Entry] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        running: RunningBatch,
        start_s: float,
        late_tpots: float,
        demoted: Set[str],
        pacing: Pacing,
    ) -> Needs:
        """One pass over those that are not known to decode on; each list in the order of service."""
        prefills, best_decodes, best_prefills, paced = [], [], [], []
        known = running.decodes
        others: Iterable[Running] = running.others
        if demoted and not demoted.isdisjoint(known.names):
            out = np.array([name in demoted for name in known.names])
            others = [*(known.request(place) for place in np.flatnonzero(out).tolist()), *others]
            known = known.where(~out)
        for request in others:
            targets, name = request.targets, request.request_id
            # ``request.decodes`` without a call: there may be hundreds.
            decodes = request.output_tokens > 0 and request.tokens - request.computed_tokens <= 1
            if targets is None or name in demoted:
                if decodes:
                    best_decodes.append((request.last_token_s or request.arrival_s, name, request))
                else:
                    best_prefills.append((request.arrival_s, name, request))
            elif decodes:
                paced.append(request)
            else:
                prefills.append((pacing.slack_s(request, targets, start_s), name, request))
        for part in (prefills, best_decodes, best_prefills):
            part.sort()
        columns = known.beside(Columns.of(paced, pacing.pace)) if paced else known
        names = running.decodes.names + tuple([request.request_id for request in running.others])
        in_turn = Paced.of(columns, start_s, late_tpots, pacing)
        return cls(names, in_turn, running, prefills, best_decodes, best_prefills)

    @property
    def drafted(self) -> bool:
        """Whether a decode holds a draft."""
        under_targets = bool((self.paced.columns.values[DRAFTED] > 0).any())
        return under_targets or any(request.draft_tokens for _, _, request in self.best_decodes)

    def without(self, gone: Set[str]) -> Needs:
        """The same but for those who are ``gone``."""
        paced, running = self.paced, self.running
        kept = np.array([name not in gone for name in paced.columns.names], np.bool_)
        columns = paced.columns.where(kept)
        decodes = running.decodes
        run_on = np.array([name not in gone for name in decodes.names], np.bool_)
        others = [request for request in running.others if request.request_id not in gone]
        return Needs(
            tuple([name for name in self.names if name not in gone]),
            Paced(columns, paced.time_s[kept], paced.guarded[kept], paced.lent_s),
            RunningBatch(decodes.where(run_on), others),
            *(
                [entry for entry in entries if entry[1] not in gone]
                for entries in (self.prefills, self.best_decodes, self.best_prefills)
            ),
        )

    def computed_tokens(self, name: str) -> int:
        """What one who runs has computed."""
        columns = self.paced.columns
        if name in columns.names:
            return int(columns.values[COMPUTED, columns.names.index(name)])
        return sum(request.computed_tokens for request in self.find({name}))

    def find(self, names: Container[str]) -> list[Running]:
        """Those of ``names`` that run, as they run."""
        decodes = self.running.decodes
        found = [decodes.request(place) for place, name in enumerate(decodes.names) if name in names]
        return found + [request for request in self.running.others if request.request_id in names]
