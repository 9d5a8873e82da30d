"""Searches for the recipe that meets a goal: a plan, and equal rates to compare."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

from jaxcompress.planning.rates import RateProblem, rate_problem
from jaxcompress.reporting import grouped
from jaxcompress.shrinking.efforts import Effort
from jaxcompress.shrinking.fitting import AIM, Attempt, Coder, fit
from jaxcompress.shrinking.goals import Goal
from jaxcompress.shrinking.quality import Quality
from jaxcompress.types import Rule

LARGEST = 12.0  # bits per weight that `rate_distortion` takes
TUNED_AIM = 0.996  # of the limit, where training may make the file a little larger
KL_TRIES = 4
CLOSE = 0.9  # of the divergence asked: what counts as met
SLOPE = -2 * math.log(2)  # of log KL by bits per weight, at high rates
Measured = tuple[Attempt, Quality | None]


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes recipes for a number of bytes, and measures what they made."""

    coder: Coder
    effort: Effort
    measure: Callable[[Attempt], Quality | None]

    @property
    def weights(self) -> int:
        """Of the planned leaves."""
        return sum(entry.value.size for entry in self.coder.planned)

    @functools.cached_property
    def problem(self) -> RateProblem:
        """What a plan needs of the leaves, measured once."""
        coder = self.coder
        entries = [
            dataclasses.replace(entry, caller_layout=coder.layouts.get(entry.name))
            for entry in coder.planned
        ]
        with coder.stages.stage("planning", f"{len(entries)} leaves"):
            return rate_problem(
                entries,
                states=self.effort.states,
                order="pivoted",
                damping=0.01,
                shrinkage=0.1,
            )

    def planned(self, nbytes: int) -> tuple[Rule, ...]:
        """Return rates by curvatures."""
        return tuple(self.problem.solve(min(8 * nbytes / self.weights, LARGEST)))

    def uniform(self, nbytes: int) -> tuple[Rule, ...]:
        """Return one rate for all leaves."""
        rate = round(min(8 * nbytes / self.weights, LARGEST), 4)
        method = f"rate_distortion(rate={rate}, states={self.effort.states})"
        return tuple((re.escape(entry.name), method) for entry in self.coder.planned)

    def fit(self, kind: str, limit: int) -> Measured:
        """Return the recipe of a kind that fits a file, measured."""
        attempt = fit(
            self.coder,
            limit,
            getattr(self, kind),
            aim=TUNED_AIM if self.effort.tuning_steps else AIM,
            tries=self.effort.tries,
        )
        quality = self.measure(attempt)
        measured = "not measured" if quality is None else f"{quality.kl:.4g} nats"
        size = grouped(attempt.file_bytes)
        self.coder.stages.say(f"{kind}: {size} bytes, KL {measured}")
        return attempt, quality


def meet(planner: Planner, goal: Goal) -> tuple[dict[str, Measured], list[str]]:
    """Return candidates by name that meet the goal, and notes.

    Without data there is only the uniform recipe; where the effort compares, the plan
    and the uniform one.

    Raises:
      ValueError: a goal that cannot be met.
    """
    main = "uniform" if planner.coder.moments is None else "plan"
    kind = {"uniform": "uniform", "plan": "planned"}[main]
    notes: list[str] = []
    if goal.file_bytes is not None:
        results = {main: planner.fit(kind, goal.file_bytes)}
    else:
        results = {main: _meet_kl(planner, kind, goal.kl, notes)}
    if main == "plan" and planner.effort.compares:
        limit = goal.file_bytes or results["plan"][0].file_bytes
        results["uniform"] = planner.fit("uniform", limit)
    return results, notes


def _meet_kl(planner: Planner, kind: str, kl: float, notes: list[str]) -> Measured:
    """Return smallest file of a few tries whose divergence is at most what is asked."""
    tried: list[tuple[float, float, Measured]] = []
    bits, coder = 3.5, planner.coder
    rest = coder.overhead()
    for _ in range(KL_TRIES):
        limit = int(rest + bits * planner.weights / 8)
        fitted = planner.fit(kind, limit)
        reached = max(fitted[1].kl, 1e-9)
        tried.append((bits, math.log(reached), fitted))
        if CLOSE * kl <= reached <= kl:
            break
        bits = _next_bits(tried, math.log(0.95 * kl))
        if any(abs(bits - at) < 0.005 for at, _, _ in tried):
            break
    met = [each for each in tried if each[1] <= math.log(kl)]
    if not met:
        notes.append(
            f"no try reached a divergence of {kl:g}: the nearest is "
            f"{min(math.exp(each[1]) for each in tried):.4g}"
        )
        return min(tried, key=lambda each: each[1])[2]
    return min(met, key=lambda each: each[2][0].file_bytes)[2]


def _next_bits(tried: list[tuple[float, float, Any]], wanted: float) -> float:
    """Return the bits where the line through the two nearest attempts meets the target
    logarithm.
    """
    near = sorted(tried, key=lambda each: abs(each[1] - wanted))[:2]
    at, value, _ = near[0]
    slope = SLOPE
    if len(near) > 1 and near[1][0] != at:
        slope = (value - near[1][1]) / (at - near[1][0])
    slope = min(max(slope, -3.0), -0.5)
    return min(max(at + (wanted - value) / slope, 1.0), LARGEST)
