"""From the traffic and the running plan to the plan that is wanted, with its reason. It decides; it changes nothing."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from dilaserve.config import Config
from dilaserve.planner import adoption, packing, program
from dilaserve.planner.operating_points import points, unloaded
from dilaserve.planner.program import Ground, Offered, PlanProgram, Point, Proposal
from dilaserve.planner.step_pace import NEVER, Kind, Stepping, blocks
from dilaserve.planner.track_record import TrackRecord
from dilaserve.plans import counted
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.step_cost import StepCost
from dilaserve.types import Demand, FamilyTraits, Flow, Plan, PlanReady

CLASSES = 6  # classes of requests that the planner distinguishes; rarer ones count as the nearest of these
UNHURRIED_ROWS = 16  # most rows on an instance in the tables of classes without deadlines
TRUSTED = 4.0  # requests seen at which half of a gain counts; fewer requests make the planner more careful
MEMORY = 45  # looks whose loads are remembered, to find surges; 90 seconds
MOST_TABLES = 512  # tables of operating points that are kept; all are dropped beyond that
STEP = 1.05  # factor: deadlines and canvases are rounded to its powers, so that like traffic shares a table


class Advice(NamedTuple):
    """The plan to change to, None to leave it as it is, and why.

    `expected` is what the better of the two should achieve, `gain` what it is better than the running one, in shares
    on time.
    """

    plan: Plan | None
    reason: str
    expected: Proposal
    gain: float = 0.0


class Choice(NamedTuple):
    """Another plan, the share of all devices that it would remake, and what it is worth more than the running one."""

    proposal: Proposal
    plan: tuple[packing.DeviceGroup, ...]
    share: float
    gain: float


class Setup(NamedTuple):
    """What does not change while serving.

    `rows` with deadlines may be on an instance, the first `levels` of the threshold may be used, within `budget` points
    (None: off); `sheds`: hopeless work is given up. `pause` are the seconds that a new instance costs, `overhead` those
    of a step outside the worker. `stepping` says what the steps of the model's family are.
    """

    rows: int = 6
    levels: int | None = None
    budget: float | None = 0.9
    sheds: bool = True
    pause: float = 0.1
    overhead: float = 0.0
    stepping: Stepping = Stepping()

    @staticmethod
    def of(
        config: Config,
        quality: QualityProfile,
        pause: float = 0.1,
        overhead: float = 0.0,
        traits: FamilyTraits = FamilyTraits(),  # noqa: B008 - a frozen value
    ) -> "Setup":
        policy = config.scheduler
        lowest = max(policy.min_confidence_threshold - 1e-6, 0.0)
        controlled = policy.threshold_control != "fixed"
        return Setup(
            rows=min(policy.guaranteed_rows, config.device.max_num_seqs),
            levels=max(1, sum(level >= lowest for level in quality.levels)) if controlled else 1,
            budget=None if policy.accuracy_budget == "off" else policy.accuracy_budget,
            sheds=policy.shed == "on",
            pause=pause,
            overhead=overhead,
            stepping=Stepping(traits, config.device.max_num_batched_tokens) if traits.exact else Stepping(traits),
        )


class PlannerPort(Protocol):
    """Whoever can be asked for a plan: the planner itself, or one in a process of its own. All of it blocks."""

    def __call__(self, demand: Demand) -> PlanReady: ...

    def learned(self, laws: Mapping[int, StepCost], quality: QualityProfile) -> None:
        """Plan with these laws, by degree, from the next question on."""

    def close(self) -> None:
        """There will be no more questions."""


class Planner:
    """Keeps the tables of operating points that were needed, and what became of its forecasts.

    `learned` renews the laws behind both.
    """

    def __init__(self, laws: Mapping[int, StepCost], quality: QualityProfile, setup: Setup | None = None) -> None:
        self.setup = setup or Setup()
        self.past: deque[tuple[Flow, ...]] = deque(maxlen=MEMORY)
        self.inclined = False  # a change was worth making at the last look
        self.unrest = 0.0  # recent changes; each counts 1 and fades by `adoption.SETTLING` a look
        self.learned(laws, quality)

    def learned(self, laws: Mapping[int, StepCost], quality: QualityProfile) -> None:
        """`laws` by degree; degrees without one are never formed."""
        self.laws, self.forecast = dict(laws), Forecast(quality)
        self.tables: dict[tuple[Kind, int, int], list[Point]] = {}
        self.track_record = TrackRecord()

    def __call__(self, demand: Demand) -> PlanReady:
        advice = self.advise(demand)
        return PlanReady(advice.plan, advice.reason)

    def close(self) -> None:
        """Nothing is held."""

    def advise(self, demand: Demand) -> Advice:
        """The plan for this demand. It takes some tens of milliseconds; the engine does not wait for it on its loop.

        1. Forecast the running plan and its rivals for the traffic that is coming, and correct both by experience.
        2. Take the rival with the largest gain, less what surges would cost it.
        3. Adopt it if the gain is large enough, now and at the last look.
        """
        possible = [degree for degree in demand.degrees if degree in self.laws]
        running = tuple(group for group in demand.plan.groups if set(group) <= set(demand.ranks))
        demand = msgspec.structs.replace(demand, plan=Plan(running))  # of the instances whose devices are all there
        ground = Ground(packing.groups(demand.ranks, possible), Counter(map(len, running)))
        if not ground.groups:
            return Advice(None, "no device is left that could hold an instance", program.NOTHING)
        self.past.append(demand.flows)
        rise = adoption.rise([load(flows) for flows in self.past])
        offered = [self.offered(flow, demand, ground, rise) for flow in few(demand.flows)]
        held = program.kept(ground.running, ground)
        question = PlanProgram(offered, ground, self.setup.pause, self.setup.budget)
        predicted = question.proposal(held)
        self.track_record.observe(predicted, demand.met, demand.ended)
        now = self.track_record.corrected(predicted)
        choices = [self.choice(rival, now, demand) for rival in self.rivals(question)]
        best = max(choices, key=lambda choice: choice.gain)
        best = best._replace(gain=best.gain - self.risk(best.proposal, now, demand, ground))
        if self.adopts(best, now, demand, ground):
            return Advice(Plan(best.plan), explained(offered, best.proposal, now, True), best.proposal, best.gain)
        reason = explained(offered, best.proposal, now, False)
        if held == dict(ground.running):
            return Advice(None, reason, now, best.gain)
        plan = Plan(packing.layout(held, demand.ranks, running))
        return Advice(plan, f"devices came or went; {reason}", now, best.gain)

    def adopts(self, best: Choice, now: Proposal, demand: Demand, ground: Ground) -> bool:
        """Whether to change to the best rival at this look; remembers that it was worth it for the next look."""
        lost = missed(best.proposal, now)
        surge = msgspec.structs.replace(demand, flows=surged(demand.flows))
        toll = self.toll(best.proposal, now, surge, ground)
        self.unrest *= adoption.SETTLING
        worth = adoption.worth_switching(best.gain, best.share, lost, self.unrest, toll)
        worth &= lost > adoption.BLUR or sum(map(bool, self.past)) >= adoption.KNOWN
        before, self.inclined = self.inclined, worth
        if not (worth and (before or best.gain > adoption.SURE)):
            return False
        self.inclined, self.unrest = False, self.unrest + 1.0
        return True

    def rivals(self, question: PlanProgram) -> Iterator[Proposal]:
        """The best plan of the program, and those that ran before, each corrected by its record."""
        ground = question.ground
        yield self.track_record.corrected(question.proposal())
        for counts in self.track_record.tried():
            if counts != dict(ground.running) and program.packable(counts, ground):
                yield self.track_record.corrected(question.proposal(counts))

    def choice(self, rival: Proposal, now: Proposal, demand: Demand) -> Choice:
        running = demand.plan.groups
        plan = packing.layout(rival.counts, demand.ranks, running)
        share = packing.changed(running, plan)
        return Choice(rival, plan, share, adoption.gain(rival, now, share, self.setup.pause) * trust(demand))

    def risk(self, wanted: Proposal, now: Proposal, demand: Demand, ground: Ground) -> float:
        """What recent surges would cost under the wanted plan, as far as the running plan withstands them better."""
        loads = [load(flows) for flows in self.past]
        if not adoption.surges(loads):
            return 0.0
        peak = msgspec.structs.replace(demand, flows=max(self.past, key=load))
        return adoption.risk(loads, self.toll(wanted, now, peak, ground))

    def toll(self, wanted: Proposal, now: Proposal, surge: Demand, ground: Ground) -> float:
        """The share on time that the wanted plan would lose against the running one in this surge."""
        if wanted.counts == now.counts:
            return 0.0
        surge = msgspec.structs.replace(surge, backlog=0)
        offered = [self.offered(flow, surge, ground) for flow in few(surge.flows)]
        question = PlanProgram(offered, ground, self.setup.pause, self.setup.budget)
        return question.proposal(now.counts).on_time - question.proposal(wanted.counts).on_time

    def offered(self, flow: Flow, demand: Demand, ground: Ground, rise: float = 1.0) -> Offered:
        """The class with its tables of operating points, and its share of the backlog."""
        base, overhead, stepping = self.laws[min(self.laws)], self.setup.overhead, self.setup.stepping
        kind = Kind(round(rounded(flow.canvas_tokens)), flow.answer_tokens)
        answer = blocks(kind, self.forecast.profile.block_length, stepping)
        kind = kind._replace(answer=answer.number * answer.length)
        reference = unloaded(base, self.forecast, kind, overhead, stepping)
        if flow.tightness is not None:
            kind = kind._replace(deadline=rounded(flow.tightness * reference))
        share = flow.rate / max(1e-9, load(demand.flows))
        rate = adoption.planned_rate(flow.rate, share * demand.backlog, self.setup.sheds, rise)
        devices = program.devices(ground)
        tables = {degree: self.table(kind, degree, max(1, devices // degree)) for degree in ground.groups}
        return Offered(named(flow), rate, reference, tables)

    def table(self, kind: Kind, degree: int, instances: int) -> list[Point]:
        key = kind, degree, instances
        if key not in self.tables:
            if len(self.tables) >= MOST_TABLES:
                self.tables.clear()
            rows = UNHURRIED_ROWS if kind.deadline == NEVER else self.setup.rows
            law, setup = self.laws[degree], self.setup
            levels, overhead, stepping = setup.levels, setup.overhead, setup.stepping
            self.tables[key] = points(law, self.forecast, kind, instances, rows, levels, overhead, stepping)
        return self.tables[key]


def few(flows: Sequence[Flow]) -> list[Flow]:
    """The most frequent flows; the others count as the one among them that is most like them."""
    flows = sorted((flow for flow in flows if flow.rate > 0.0), key=lambda flow: -flow.rate)
    rates = [flow.rate for flow in flows[:CLASSES]]
    for flow in flows[CLASSES:]:
        nearest = min(range(CLASSES), key=lambda i: distance(flows[i], flow))
        rates[nearest] += flow.rate
    return [msgspec.structs.replace(flow, rate=rate) for flow, rate in zip(flows, rates, strict=False)]


def distance(one: Flow, other: Flow) -> float:
    """In orders of magnitude; having a deadline or not is worse than any."""
    if (one.tightness is None) != (other.tightness is None):
        return NEVER
    tightness = abs(ratio(one.tightness or 1.0, other.tightness or 1.0))
    return tightness + abs(ratio(one.canvas_tokens, other.canvas_tokens))


def ratio(one: float, other: float) -> float:
    return max(one, other) / max(1e-9, min(one, other)) - 1.0


def surged(flows: Sequence[Flow]) -> tuple[Flow, ...]:
    return tuple(msgspec.structs.replace(flow, rate=adoption.SURGE * flow.rate) for flow in flows)


def load(flows: Sequence[Flow]) -> float:
    return sum(flow.rate for flow in flows)


def missed(wanted: Proposal, now: Proposal) -> float:
    return 1.0 - min(wanted.on_time, now.on_time)


def rounded(amount: float) -> float:
    return float(STEP ** round(np.log(max(1e-3, amount)) / np.log(STEP)))


def trust(demand: Demand) -> float:
    """The factor on a gain, from 0 to 1: few requests may look like this by chance."""
    seen = demand.seconds * load(demand.flows)
    return seen / (seen + TRUSTED)


def named(flow: Flow) -> str:
    deadline = "without deadline" if flow.tightness is None else f"at {flow.tightness:.2g}x"
    return f"{deadline} ({flow.canvas_tokens - flow.answer_tokens}+{flow.answer_tokens} tokens)"


def explained(offered: Sequence[Offered], wanted: Proposal, now: Proposal, adopted: bool) -> str:
    """One sentence: the load that was seen, what is expected, and why."""
    load = ", ".join(f"{one.rate:.3g}/s {one.name}" for one in offered if one.rate > 0.0) or "no load"
    new, old = f"{counted(wanted.counts)} ({prospects(wanted)})", f"{counted(now.counts)} ({prospects(now)})"
    if adopted:
        return f"{load}: {new} instead of {old}"
    if wanted.counts == now.counts:
        return f"{load}: {old} is best"
    return f"{load}: {old} stays, as {new} would gain too little"


def prospects(proposal: Proposal) -> str:
    drop = f", {proposal.drop:.2f} points less accurate" if proposal.drop >= 0.005 else ""
    return f"{100 * proposal.on_time:.1f} % on time in {proposal.latency:.3g} s{drop}"
