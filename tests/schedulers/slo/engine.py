"""A tiny engine on a virtual clock: chunked prefill, one token a decode, KV cache counted in tokens."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.profiles import Profile
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.targets import Targets

TRUTH = Profile(base_s=0.0248, token_s=6.878e-5, context_s=8e-8)
LOOSE, TIGHT = (5.0, 0.1), (3.0, 0.05)


@dataclass
class Request:
    name: str
    arrival_s: float
    prompt: int
    output: int
    targets: Targets | None
    computed: int = 0
    times: list[float] = field(default_factory=list)
    preempted: int = 0

    @property
    def tokens(self):
        return self.prompt + len(self.times)

    @property
    def missing(self):
        return max(1, self.tokens - self.computed)

    def attained(self, tolerance=0.05):
        """Every tenth token in time, from the first one's deadline, as SLOs-Serve counts."""
        t = self.targets
        due = self.arrival_s + t.ttft_s
        checks = [(due, self.times[0])]
        start = max(due, self.times[0])
        checks += [
            (start + i * t.tpot_s * (1 + tolerance), at) for i, at in enumerate(self.times) if i % 10 == 0
        ]
        return all(at <= by + 1e-9 for by, at in checks)


def trace(seed, rate, seconds, *, tight=0.5, prompt=900, output=150, without=0.0, truth=TRUTH):
    rng = random.Random(seed)
    now, made = 0.0, []
    while True:
        now += rng.expovariate(rate)
        if now > seconds:
            return made
        tokens = max(16, min(8000, int(rng.lognormvariate(math.log(prompt), 0.9))))
        slowdown, tpot = TIGHT if rng.random() < tight else LOOSE
        alone = truth.base_s + truth.token_s * tokens
        targets = Targets(slowdown * alone, tpot) if rng.random() >= without else None
        length = max(2, min(1000, int(rng.lognormvariate(math.log(output), 0.8))))
        made.append(Request(f"r{len(made)}", now, tokens, length, targets))


class Engine:
    """Serves a trace to its end. ``planner`` None is first come, first served, decodes before prompts."""

    def __init__(self, requests, planner=None, *, budget=8192, seats=256, kv=400_000, truth=TRUTH, jumps=()):
        self.coming = sorted(requests, key=lambda r: r.arrival_s)
        self.requests = {r.name: r for r in requests}
        self.planner = planner
        self.limits = Limits(step_tokens=budget, running_requests=seats)
        self.kv, self.truth = kv, truth
        self.now_s = 0.0
        self.jumps = dict(jumps)
        self.offset = 0.0
        self.waiting, self.running = [], []
        self.steps = 0
        self.held_back = {}
        self.longest_held_back = 0
        self.idle = 0

    @property
    def clock(self):
        return self.now_s + self.offset

    def run(self, most_steps=200_000):
        while self.coming or self.waiting or self.running:
            while self.coming and self.coming[0].arrival_s <= self.now_s:
                self._arrive(self.coming.pop(0))
            if not self.waiting and not self.running:
                self.now_s = self.coming[0].arrival_s
                continue
            self.steps += 1
            assert self.steps < most_steps, "the engine goes round without an end"
            self.offset += self.jumps.get(self.steps, 0.0)
            self._step()
        return list(self.requests.values())

    def _arrive(self, request):
        self.waiting.append(request.name)
        if self.planner:
            self.planner.arrive(self._as_waiting(request))

    def _as_waiting(self, r):
        first = r.times[0] if r.times else None
        return Waiting(
            r.name,
            "",
            r.tokens,
            r.arrival_s,
            targets=r.targets,
            output_tokens=len(r.times),
            first_token_s=first,
        )

    def _free(self):
        return self.kv - sum(self.requests[name].computed for name in self.running)

    def _preempt(self, name):
        request = self.requests[name]
        self.running.remove(name)
        request.computed = 0
        request.preempted += 1
        self.waiting.insert(0, name)
        if self.planner:
            self.planner.backlog.put_back(self._as_waiting(request), preempted=True)

    def _step(self):
        plan = self._plan() if self.planner else None
        active = plan is not None and plan.active
        if active:
            for name in plan.preempt:
                self._preempt(name)
            assert sorted(plan.order) == sorted(self.running)
            self.running = list(plan.order)
        left = min(self.limits.step_tokens, plan.step_tokens) if active else self.limits.step_tokens
        given = {}
        for name in list(self.running):
            if name not in self.running:
                continue
            want = min(left, self.requests[name].missing)
            want = plan.cap(name, want) if active else want
            while want and self._free() - sum(given.values()) < want and len(self.running) > 1:
                victim = self.running[-1]
                left += given.pop(victim, 0)
                self._preempt(victim)
                if victim == name:
                    want = 0
            if want:
                given[name] = want
                left -= want
        names = list(plan.waiting) if active else list(self.waiting)
        for name in names:
            request = self.requests[name]
            want = min(left, request.missing)
            want = plan.cap(name, want) if active else want
            fits = self._free() - sum(given.values()) >= request.tokens
            if want <= 0 or not fits or len(self.running) >= self.limits.running_requests:
                break
            self.waiting.remove(name)
            if self.planner:
                self.planner.backlog.remove(name)
            self.running.append(name)
            given[name] = want
            left -= want
        self._execute(given)

    def _plan(self):
        running = [
            Running(
                request_id=r.name,
                arrival_s=r.arrival_s + self.offset,
                tokens=r.tokens,
                computed_tokens=r.computed,
                output_tokens=len(r.times),
                targets=r.targets,
                first_token_s=r.times[0] + self.offset if r.times else None,
                last_token_s=r.times[-1] + self.offset if r.times else None,
            )
            for r in (self.requests[name] for name in self.running)
        ]
        plan = self.planner.plan(self.clock, running, self._free(), self.limits)
        for name in plan.caps:
            assert name in self.running or name in plan.waiting
        assert sum(plan.caps.values()) <= self.limits.step_tokens
        return plan

    def _execute(self, given):
        if not given:
            self.idle += 1
            self.now_s += 0.001
            assert self.idle < 20_000, "nothing is scheduled"
            return
        context = sum(self.requests[name].computed for name in given)
        features = StepFeatures(sum(given.values()), len(given), context)
        seconds = StepTimeModel(self.truth).seconds(features)
        self.now_s += seconds
        if self.planner:
            self.planner.observe_step(features, seconds)
        for name in self.running:
            self.held_back[name] = 0 if name in given else self.held_back.get(name, 0) + 1
            self.longest_held_back = max(self.longest_held_back, self.held_back[name])
        for name, tokens in given.items():
            request = self.requests[name]
            request.computed += tokens
            if request.computed >= request.tokens:
                request.times.append(self.now_s)
                if len(request.times) >= request.output:
                    self.running.remove(name)
                    if self.planner:
                        self.planner.observe_finish(name, "", len(request.times))


def planner(config=None, prior=TRUTH):
    return Planner(config or SLOConfig(), StepTimeModel(prior))


def attainment(requests):
    asked = [r for r in requests if r.targets]
    return sum(r.attained() for r in asked) / max(1, len(asked))
