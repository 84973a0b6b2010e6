"""Step costs by tensor-parallel degree from those of one device, for machines that nobody has measured."""

import msgspec

from dilaserve.cost import StepCost

LAYERS, WIDTH = 32, 4096  # LLaDA-8B
REDUCTIONS = 2 * LAYERS  # all-reduces of one step
LATENCY = {1: 0.0, 2: 9e-6, 4: 11e-6, 8: 14e-6}  # seconds of one small all-reduce inside a captured graph, by degree
LINK = 350e9  # bytes a second that an all-reduce over NVLink reaches
OUTSIDE = 0.7e-3  # seconds of a step that no other device can share


def by_degree(law: StepCost, degrees: tuple[int, ...] = (1, 2, 4, 8), outside: float = OUTSIDE) -> dict[int, StepCost]:
    """Everything but `outside` is divided by the degree; every layer pays two all-reduces of its activations."""
    return {degree: shared(law, degree, outside) for degree in degrees}


def shared(law: StepCost, degree: int, outside: float) -> StepCost:
    if degree == 1:
        return law
    divided = law.scaled(1.0 / degree)
    sent = 2 * (degree - 1) / degree * WIDTH * 2  # bytes of one token in one all-reduce
    return msgspec.structs.replace(
        divided,
        fixed=(law.fixed - outside) / degree + outside + REDUCTIONS * LATENCY[degree],
        token=divided.token + REDUCTIONS * sent / LINK,
        row=law.row,
    )
