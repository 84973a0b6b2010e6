"""When another plan is adopted: what a switch must gain, how the load will rise, and what surges would cost.

It judges numbers; `planner` gathers them. It does not know single devices or the time.
"""

from collections.abc import Sequence

from dilaserve.planner.program import Proposal, switching

HEADROOM = 1.1  # factor on the observed rate: plans are made for more than was seen
STEEPEST = 1.15  # largest factor by which a rising load is extrapolated until a plan stands
HORIZON = 10.0  # seconds in which a plan should clear the backlog
MARGIN = 0.01  # gain in on-time share below which a plan change is not worth making
DOUBT = 0.1  # share of the missed requests added to that margin: forecasts are poor above the knee of the load curve
SURE = 0.1  # gain in on-time share above which a plan is adopted at the first look, not the second
SETTLING = 0.9  # factor on `unrest` at each look: how quickly the extra margin after a change fades
LATE = 3.0  # looks that pass under the wrong plan until a change stands, when a surge comes
SURGE = 2.0  # factor on the load that a plan should withstand before it is adopted for latency
OFTEN = 1 / 15  # surges per look that are assumed where none were seen: one in the 30 seconds that a plan stays
KNOWN = 4  # looks with traffic before any change for latency alone
LOW = 0.4  # share of the peak load below which a load counts as low
HIGH = 0.6  # share of the peak load above which a load that was low counts as a surge
BLUR = 0.03  # missed share that counts as none: below it only latency can be gained


def planned_rate(rate: float, backlog: float, sheds: bool, rise: float = 1.0) -> float:
    """Requests per second to plan for. A backlog that is never shed is no sign of more to come, and does not count."""
    return HEADROOM * rise * rate + (backlog / HORIZON if sheds else 0.0)


def rise(loads: Sequence[float]) -> float:
    """The factor by which the load will soon be higher; 1 for a falling load.

    It continues the rise over the last four looks at half the speed, because chance alone makes loads rise.
    """
    if len(loads) < 4:
        return 1.0
    before, lately = sum(loads[-4:-2]), sum(loads[-2:])
    return min(STEEPEST, max(1.0, (1.0 + lately / max(1e-9, before)) / 2))


def gain(wanted: Proposal, now: Proposal, changed: float, pause: float) -> float:
    """What a switch gains in value, less its cost when the share `changed` of all devices is remade."""
    return wanted.value - now.value - switching(changed, pause)


def worth_switching(gain: float, changed: float, missed: float = 0.0, unrest: float = 0.0, toll: float = 0.0) -> bool:
    """Whether to adopt a plan that remakes the share `changed` of all devices (hysteresis after SHEPHERD)."""
    return changed > 0.0 and gain > least_gain(missed, unrest, toll)


def least_gain(missed: float, unrest: float, toll: float) -> float:
    """The least gain in on-time share at which the plan changes.

    `missed` is the share expected to miss under either plan, `unrest` counts recent changes, `toll` is the share that
    the other plan would lose more than the running one in a surge.

    1. Usually the gain must exceed the error of forecasts, which grows with `missed`, and more after recent changes.
    2. Where almost nothing is missed, only latency can be gained. The gain must then also pay for a surge.
    3. Where requests are missed and the other plan has more room, waiting costs deadlines: the margin alone suffices.
    """
    usual = (1.0 + unrest) * (MARGIN + DOUBT * missed)
    if missed <= BLUR:
        return usual + OFTEN * LATE * SURGE * max(0.0, toll)
    return MARGIN if toll < 0.0 else usual


def surges(loads: Sequence[float]) -> int:
    """How many times the load has risen to near its peak from far below."""
    low, high = LOW * max(loads, default=0.0), HIGH * max(loads, default=0.0)
    count, below = 0, False
    for load in loads:
        count += below and load >= high
        below = load < low or (below and load < high)
    return count


def risk(loads: Sequence[float], loss: float) -> float:
    """What surges like those in `loads` would cost, as a share of the requests at the last of them.

    `loss` is the on-time share that the plan loses at the peak. A surge finds the wrong plan for `LATE` looks.
    """
    if not loads or loss <= 0.0:
        return 0.0
    return surges(loads) / len(loads) * LATE * loss * max(loads) / max(1e-9, loads[-1])
