"""What of a plan is known before its step: who runs, in which need, and what the decodes take of the step.

An engine has time to find that out while its device computes the step before. Between then and the plan
requests end, and others arrive. Ends only free what was given to them; the step may begin a little earlier or
later than foreseen, which moves all deadlines alike. So a layout is corrected, not made again.
"""

from __future__ import annotations

from collections.abc import Collection, Set

from penstock.schedulers.slo.batch import Entry, Needs
from penstock.schedulers.slo.requests import Running, Waiting
from penstock.schedulers.slo.step_plan import Step


class Layout:
    """Good for one plan, as long as nobody joins or leaves the columns that it was made from.

    ``start_s`` is when its step is expected to begin. ``victims`` are best-effort
    requests that may be thrown out, the last one to go first; ``oldest`` is the best-effort prompt that waits
    longest, running or not; ``overdue`` are those that may not be passed over
    again. ``step`` holds the decodes, with prompts beside them or, if not ``beside_prompts``, without.
    """

    def __init__(
        self,
        start_s: float,
        needs: Needs,
        victims: list[Running],
        oldest: Running | Waiting | None,
        overdue: Set[str],
        step: Step,
        *,
        beside_prompts: bool,
    ) -> None:
        self.start_s = start_s
        self.victims = victims
        self.oldest = oldest
        self.overdue = overdue
        self.step = step
        self.prefills: list[Entry] = needs.prefills
        self.best_decodes: list[Entry] = needs.best_decodes
        self.best_prefills: list[Entry] = needs.best_prefills
        self.drafted = needs.drafted
        """Whether any of them holds a draft."""
        self.running = len(needs.names)
        """How many run and have a token to come."""
        self._needs = needs
        self._beside_prompts = beside_prompts
        self._late_s = 0.0
        self._ended: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Of those, as they run."""
        names, ended = self._needs.names, self._ended
        return tuple([name for name in names if name not in ended]) if ended else names

    @property
    def needs(self) -> Needs:
        """Those who run, without those that ended: for plans that decide more than who comes in."""
        if self._ended:
            self._needs = self._needs.without(self._ended)
            self._ended = set()
        return self._needs

    def fits(self, *, prompts: bool, thrown_out: Set[str]) -> bool:
        """Whether the step holds what one beside ``prompts``, or without, would, if some are thrown out."""
        alike = prompts == self._beside_prompts or self.step.serves_all
        return alike and self.overdue.isdisjoint(thrown_out)

    def replace(self, step: Step) -> None:
        """Another step of the same decodes, as they were told."""
        self.step = step
        if self._late_s:
            step.begins_later(self._late_s)

    def leave(self, ended: Collection[str]) -> None:
        """These do not run any more; what the step gave to them is free."""
        needs = self._needs
        gone = {name for name in ended if name in self.step.caps or name in needs.names}
        if not gone:
            return
        for name in gone & self.step.caps.keys():
            self.step.take_back(name, needs.computed_tokens(name))
        self.running -= len(gone)
        self._ended |= gone
        self.overdue -= gone
        self.victims = [request for request in self.victims if request.request_id not in gone]
        self.prefills = _without(self.prefills, gone)
        self.best_decodes = _without(self.best_decodes, gone)
        self.best_prefills = _without(self.best_prefills, gone)

    def begins(self, start_s: float) -> None:
        """The step begins then: all that is due in it has so much less time, or more."""
        late_s = start_s - self.start_s
        if late_s:
            self.start_s = start_s
            self._late_s += late_s
            self.step.begins_later(late_s)
            self.prefills = [(slack - late_s, name, request) for slack, name, request in self.prefills]


def _without(entries: list[Entry], gone: Set[str]) -> list[Entry]:
    return [entry for entry in entries if entry[1] not in gone]
