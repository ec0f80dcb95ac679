"""The SLO policy: one plan a step, from what runs, what waits and what is free.

Without a target anywhere the plan is passive: the engine does what it does without this policy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from itertools import chain, islice

import msgspec

from penstock.schedulers.drafts import Drafts
from penstock.schedulers.slo.backlog import Backlog
from penstock.schedulers.slo.batch import Entry, Needs
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import Columns, RunningBatch
from penstock.schedulers.slo.layout import Layout
from penstock.schedulers.slo.lengths import OutputLengths
from penstock.schedulers.slo.pacing import Pacing
from penstock.schedulers.slo.plan import PASSIVE, Plan
from penstock.schedulers.slo.profiles import find_profile
from penstock.schedulers.slo.replan import ReplanCounters, Replanner
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.seats import Seats
from penstock.schedulers.slo.step_drafts import draft
from penstock.schedulers.slo.step_plan import Prompt, Step
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.supply import PLAIN
from penstock.schedulers.slo.suspension import Suspensions

BEST_EFFORT_WINDOW = 16
MOST_SHIFTED = 0.25
"""Of the longest step: by how much a step may begin earlier or later than it was laid out for."""
NO_DECODES = Columns.of((), "mean")


class PlannerCounters(msgspec.Struct):
    """Totals since the start, for metrics."""

    plans: int = 0
    passive: int = 0
    skipped: int = 0
    demoted_running: int = 0
    preempted: int = 0
    clock_steps_back: int = 0


class Planner:
    """Owns the backlog of waiting requests and everything that is learned. One object an engine."""

    def __init__(
        self, config: SLOConfig, model: StepTimeModel | None = None, drafts: Drafts | None = None
    ) -> None:
        """``drafts`` share the model; whoever hears of drafts tells them. Without, drafts are left alone."""
        self.config = config
        self.model = model or StepTimeModel(find_profile(config.profile))
        self.drafts = drafts
        self.lengths = OutputLengths()
        self.pacing = Pacing(config, self.lengths)
        self.backlog = Backlog()
        self.replanner = Replanner(config, self.model, self.lengths, self.backlog)
        self.suspensions = Suspensions(config.most_skipped_steps, config.most_skipped_s)
        self.counters = PlannerCounters()
        self._demoted: set[str] = set()
        self._thrown_out: dict[str, int] = {}
        self._now_s = float("-inf")
        self._whole = PASSIVE
        self._laid_out_whole = False

    def arrive(self, request: Waiting) -> None:
        """A request arrives.

        Raises:
            ValueError: its id waits already.
        """
        self.backlog.add(request)
        if request.targets is not None:
            self.replanner.arrived(request.missing_tokens)

    def observe_step(self, features: StepFeatures, seconds: float) -> None:
        """A step of these features took so long."""
        self.model.observe(features, seconds)
        self.pacing.observe_step(seconds)

    def observe_finish(self, request_id: str, class_name: str, output_tokens: int) -> None:
        """A request ended by itself. Aborts are reported to ``leave`` only."""
        self.lengths.observe(class_name, output_tokens)
        self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """A request is gone, in whatever state it was."""
        if request_id in self.backlog:
            self.backlog.remove(request_id)
        self.replanner.admitted.pop(request_id, None)
        self._demoted.discard(request_id)
        self._thrown_out.pop(request_id, None)
        self.replanner.finished()

    @property
    def replan_counters(self) -> ReplanCounters:
        """What admission did."""
        return self.replanner.counters

    def closed(self, running: int, limits: Limits) -> bool:
        """Whether nobody can come in beside so many running requests unless one of them is thrown out."""
        return limits.running_requests <= running or not len(self.backlog)

    def whole(self, now_s: float, names: tuple[str, ...], free_kv_tokens: int, limits: Limits) -> Plan | None:
        """The plan where all that run, ``names``, decode under targets of theirs and nobody can come in:
        without a prompt to serve each has its token, however much slack it has. None where there is more to
        decide.

        Admission is decided when somebody can come in. There is a block for each, so nobody will be thrown
        out and the order may stay as it is.
        """
        number = len(names)
        fits = number <= limits.step_tokens and number * limits.block_tokens <= free_kv_tokens
        if not number or not fits or not self.closed(number, limits) or self.drafts or now_s < self._now_s:
            return None
        laid_out = self._laid_out_whole and self._whole.order == names
        if not laid_out and not self.lay_out_whole(now_s, names):
            return None
        self._laid_out_whole = False
        self._now_s = now_s
        self.counters.plans += 1
        self.backlog.put_in_front(())
        self.suspensions.record((), now_s)
        return self._whole

    def lay_out_whole(self, now_s: float, names: tuple[str, ...]) -> bool:
        """Make the plan that gives each of ``names`` its token, which stands while they do, and notice
        deadlines of others that passed; False if one of them is best effort."""
        if self._whole.order != names:
            if not self._demoted.isdisjoint(names):
                return False
            caps = dict.fromkeys(names, 1)
            self._whole = Plan(active=True, whole=True, step_tokens=len(names), caps=caps, order=names)
        self.replanner.expire(now_s)
        self._laid_out_whole = True
        return True

    def plan(self, now_s: float, running: Sequence[Running], free_kv_tokens: int, limits: Limits) -> Plan:
        """The next step. ``free_kv_tokens`` are free or held by the prefix cache alone."""
        self.counters.plans += 1
        layout = self.lay_out(now_s, running, free_kv_tokens, limits)
        if layout is None:
            self.counters.passive += 1
            self.backlog.put_in_front(())
            self.suspensions.record((), now_s)
            return PASSIVE
        return self._step(now_s, layout, free_kv_tokens, limits)

    def lay_out(
        self, now_s: float, running: Sequence[Running], free_kv_tokens: int, limits: Limits
    ) -> Layout | None:
        """What can be known now of the step that begins ``limits.in_flight_s`` later: admission is decided if
        that is due, and the decodes get their tokens. ``running`` are as they will be then. None where nobody
        has targets."""
        if now_s < self._now_s:
            self.counters.clock_steps_back += 1
            self.replanner.clock_stepped_back()
            self.suspensions.clock_stepped_back(now_s)
        self._now_s = now_s
        if not self.backlog.with_targets and all(request.targets is None for request in running):
            return None
        start_s = now_s + limits.in_flight_s
        if not isinstance(running, RunningBatch):
            running = RunningBatch(NO_DECODES, running)
        needs = Needs.of(running, start_s, self.config.late_tpots, self._demoted, self.pacing)
        self._demote_hopeless(needs)
        victims = self._victims(needs)
        if self.replanner.due(now_s):
            self._replan(now_s, needs, victims, free_kv_tokens, limits)
        overdue = self.suspensions.overdue(start_s)
        prompts = bool(needs.prefills or self.replanner.admitted)
        step = self._with_decodes(needs, overdue, limits, prompts=prompts)
        oldest = self._oldest(needs.best_prefills)
        return Layout(start_s, needs, victims, oldest, overdue, step, beside_prompts=prompts)

    def complete(
        self, layout: Layout, now_s: float, ended: Collection[str], free_kv_tokens: int, limits: Limits
    ) -> Plan | None:
        """The plan of the step that was laid out, now that it begins: without those who ``ended`` since then.
        Only where few wait and some of them just came is admission decided here. None where the step begins
        so much earlier or later than foreseen that another plan is better made."""
        start_s = now_s + limits.in_flight_s
        shifted_s = abs(start_s - layout.start_s)
        if now_s < self._now_s or shifted_s > self.config.longest_step_s * MOST_SHIFTED:
            return None
        self.counters.plans += 1
        self._now_s = now_s
        if ended:
            layout.leave(ended)
            if layout.oldest is not None and layout.oldest.request_id in ended:
                layout.oldest = self._oldest(layout.best_prefills)
        layout.begins(start_s)
        if self.replanner.due_at_once:
            self._replan(now_s, layout.needs, layout.victims, free_kv_tokens, limits)
        return self._step(now_s, layout, free_kv_tokens, limits)

    def _replan(
        self, now_s: float, needs: Needs, victims: list[Running], free_kv_tokens: int, limits: Limits
    ) -> None:
        self.replanner.yields = self.drafts.yields if self.drafts else PLAIN
        prefills = [entry[2] for entry in needs.prefills]
        reclaimable = sum(request.computed_tokens for request in victims)
        self.replanner.replan(now_s, needs.paced.columns, prefills, free_kv_tokens + reclaimable, limits)

    def _with_decodes(self, needs: Needs, overdue: Set[str], limits: Limits, *, prompts: bool) -> Step:
        step = Step(self.config, self.model, limits)
        if overdue:
            step.force(needs.find(overdue))
        step.decode(needs.paced, prompts=prompts)
        return step

    def _demote_hopeless(self, needs: Needs) -> None:
        """A prompt whose deadline is out of reach goes on as best effort, with what it has computed."""
        kept = []
        for slack, name, request in needs.prefills:
            alone = self.model.seconds(StepFeatures(request.missing_tokens, 1, request.tokens))
            if alone > slack and (self.model.corrected or slack < 0):
                self._demoted.add(name)
                self._whole = PASSIVE
                self.counters.demoted_running += 1
                needs.best_prefills.append((request.arrival_s, name, request))
            else:
                kept.append((slack, name, request))
        needs.prefills = kept
        needs.best_prefills.sort()

    def _victims(self, needs: Needs) -> list[Running]:
        """Best-effort requests that may be thrown out, the last to come at the end."""
        requests = (entry[2] for entry in chain(needs.best_decodes, needs.best_prefills))
        most = self.config.most_preemptions
        victims = [r for r in requests if self._thrown_out.get(r.request_id, 0) < most]
        return sorted(victims, key=lambda request: (request.arrival_s, request.request_id))

    def _step(self, now_s: float, layout: Layout, free_kv_tokens: int, limits: Limits) -> Plan:
        start_s = now_s + limits.in_flight_s
        patient = self._patient(layout, now_s)
        free_seats = limits.running_requests - layout.running
        seats = Seats(free_kv_tokens, free_seats, layout.victims, self._thrown_out)
        reserved = self._need(patient) if isinstance(patient, Waiting) else 0.0
        admitted = self._let_in(seats, reserved, start_s)
        prompts: list[Prompt] = sorted([*layout.prefills, *admitted], key=lambda prompt: prompt[:2])
        gone = set(seats.preempted)
        if not layout.fits(prompts=bool(prompts), thrown_out=gone):
            overdue = layout.overdue - gone
            layout.replace(self._with_decodes(layout.needs, overdue, limits, prompts=bool(prompts)))
        step = layout.step
        best_decodes = [entry for entry in layout.best_decodes if entry[1] not in gone]
        # Where drafts are chosen and no prompt waits, best-effort decodes may have some, too.
        decodes_first = self.drafts is not None and not prompts
        if decodes_first:
            step.fill_with_decodes(best_decodes)
        drafts = {}
        if layout.drafted:
            missing = sum(prompt[2].missing_tokens for prompt in prompts)
            drafts = draft(self.drafts, step, layout.needs, missing)
        step.lend(prompts)
        served = self._serve_patient(step, seats, patient, gone, bool(prompts))
        served += step.prefill(prompts, limits.step_tokens)
        step.lend_no_more()
        if not decodes_first:
            step.fill_with_decodes(best_decodes)
        best = [entry for entry in layout.best_prefills if entry[1] not in gone]
        best_effort = [*best, *self._best_effort(seats, patient)]
        served += step.prefill(best_effort, limits.step_tokens, floor=not step.caps)
        if not step.caps:
            for request in layout.needs.find(set(layout.needs.names) - gone):
                step.give(request, limits.step_tokens)
        return self._finish(now_s, layout, served, seats, drafts, limits.block_tokens)

    def _need(self, job: Waiting) -> float:
        """KV tokens to have free for a request that comes in."""
        quantile, most = self.config.output_quantile, job.max_output_tokens
        return job.tokens + self.lengths.remaining(job.class_name, quantile, job.output_tokens, most)

    def _let_in(self, seats: Seats, reserved: float, start_s: float) -> list[Prompt]:
        """Admitted requests in the order of their deadlines, until one does not fit."""
        prompts: list[Prompt] = []
        for name in self.replanner.admitted:
            job = self.backlog.get(name)
            if job is None:
                continue
            if not seats.make_room(reserved + job.tokens):
                break
            seats.free_kv_tokens += reserved
            prompts.append((job.due_s - start_s, name, job))
        return prompts

    def _patient(self, layout: Layout, now_s: float) -> Running | Waiting | None:
        """The best-effort prompt that waits longest, if that is long."""
        oldest = layout.oldest
        waited_long = oldest is not None and now_s - oldest.arrival_s >= self.config.patience_s
        return oldest if waited_long else None

    def _oldest(self, best_prefills: Sequence[Entry]) -> Running | Waiting | None:
        """The best-effort prompt that waits longest, whether it runs or not."""
        waiting: list[Running | Waiting] = [*self.backlog.best_effort(1)]
        first = [*(entry[2] for entry in best_prefills[:1]), *waiting]
        return min(first, key=lambda request: request.arrival_s, default=None)

    def _serve_patient(
        self,
        step: Step,
        seats: Seats,
        patient: Running | Waiting | None,
        thrown_out: set[str],
        contested: bool,
    ) -> list[str]:
        """A share of the step for the one that waited too long; all it needs where nobody else wants it."""
        if patient is None or patient.request_id in thrown_out:
            return []
        if isinstance(patient, Waiting) and not seats.take(patient.tokens):
            return []
        share = step.share(self.config.patient_share) if contested else step.share(1.0)
        return step.prefill([(float("inf"), patient.request_id, patient)], share)

    def _best_effort(self, seats: Seats, patient: Running | Waiting | None) -> list[Prompt]:
        """Waiting requests that fit into what is free: those not admitted by deadline, the others by age."""
        if seats.free_seats < 1:
            return []
        prompts: list[Prompt] = []
        rejected = (self.backlog.get(name) for name in islice(self.replanner.rejected, BEST_EFFORT_WINDOW))
        for job in (*rejected, *self.backlog.best_effort(BEST_EFFORT_WINDOW)):
            if job is None or (patient is not None and job.request_id == patient.request_id):
                continue
            if not seats.take(self._need(job)):
                break
            prompts.append((float("inf"), job.request_id, job))
        return prompts

    def _finish(
        self,
        now_s: float,
        layout: Layout,
        served: list[str],
        seats: Seats,
        drafts: dict[str, int],
        block_tokens: int,
    ) -> Plan:
        step, best = layout.step, [*layout.best_decodes, *layout.best_prefills]
        thrown_out = set(seats.preempted)
        waiting = tuple(name for name in served if name in self.backlog)
        self.backlog.put_in_front(waiting)
        caps = step.caps
        staying = layout.running - len(thrown_out)
        skipped: list[str] = []
        if staying != len(caps) - len(waiting):
            skipped = [n for n in layout.needs.names if n not in caps and n not in thrown_out]
        # Where there is room for the tokens of all, and a block for each, the engine will throw out nobody.
        needed = step.tokens + staying * block_tokens
        reorders = bool(skipped or thrown_out) or seats.free_kv_tokens < needed
        order = self._order(layout.needs, thrown_out) if reorders else layout.names
        self.suspensions.record(skipped, now_s)
        self.counters.skipped += len(skipped)
        self.counters.preempted += len(seats.preempted)
        return Plan(
            active=True,
            step_tokens=max(1, step.tokens - step.draft_tokens),
            caps=caps,
            order=order,
            reorders=reorders,
            waiting=waiting,
            preempt=tuple(seats.preempted),
            best_effort=frozenset([name for _, name, _ in best if name in caps]),
            drafts=drafts,
            features=step.features,
            predicted_s=self.model.seconds(step.features),
        )

    def _order(self, needs: Needs, thrown_out: Set[str]) -> tuple[str, ...]:
        """Those who run, the first to throw out at the end."""
        best = [*needs.best_decodes, *needs.best_prefills]
        ordered = chain(
            needs.paced.names_by_turn(guarded=True),
            [name for _, name, _ in needs.prefills],
            needs.paced.names_by_turn(guarded=False),
            [name for _, name, _ in sorted(best, key=lambda entry: entry[2].arrival_s)],
        )
        return tuple([name for name in ordered if name not in thrown_out])

    def check_integrity(self) -> None:
        """Assert the invariants of everything that is kept."""
        self.backlog.check_integrity()
        self.lengths.check_integrity()
        self.suspensions.check_integrity()
