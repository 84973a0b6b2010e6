"""A built-in profile: LLaDA-8B in bfloat16 on an H200, from data sheets and published figures, not measured."""

from dilaserve.profile.block_chain import chain
from dilaserve.profile.decode_speed import ANY, BINS, PARTS, Law, QualityProfile, TaskProfile
from dilaserve.profile.profile_file import ModelProfile, cost_key, pace
from dilaserve.profile.step_cost import StepCost

BLOCK, BLOCKS = 32, 8
LEVELS = (0.9, 0.8, 0.7, 0.6)
STEPS = (78.6, 60.9, 48.7, 40.2)  # GSM8K, 256 tokens, dual cache, by level
ACCURACY = (78.6, 78.9, 77.0, 71.7)
WEIGHTS_BYTES, BANDWIDTH = 16e9, 4.1e12  # read once a step; bytes a second that a copy reaches
PARAMETERS, FLOPS = 8e9, 0.6 * 790e12  # two operations each a token; what matrix products reach
LAUNCHES = 0.7e-3  # seconds of a step outside the kernels
KNEE = 256  # packed tokens below which reading the weights hides the arithmetic
ATTENTION_FLOPS, SOFTMAX_RATE = 4 * 4096 * 32, 0.35 * 790e12
LOGITS = 126_464 * 4096 * 2 / FLOPS + 126_464 * 10 / BANDWIDTH
LAYERS, WIDTH = 32, 4096
SUM_LATENCY = {1: 0.0, 2: 9e-6, 4: 11e-6, 8: 14e-6}  # seconds of one small all-reduce over NVLink, by degree
SUM_RATE = 350e9  # bytes a second that a large one reaches


def llada_8b_h200() -> ModelProfile:
    drops = tuple(max(0.0, ACCURACY[0] - accuracy) for accuracy in ACCURACY)
    laws = tuple((law_for(steps / BLOCKS),) * PARTS for steps in STEPS)
    task = TaskProfile(laws=laws, drop=drops, mean_drop=drops, accuracy=ACCURACY[0], steps=STEPS)
    quality = QualityProfile(tasks={ANY: task}, block_length=BLOCK, levels=LEVELS)
    return ModelProfile(
        model="LLaDA-8B",
        made="from data sheets and published figures",
        machine="NVIDIA H200",
        costs={cost_key("cuda", degree): law_at(degree) for degree in SUM_LATENCY},
        quality=quality,
        measured=False,
    )


def law_at(degree: int) -> StepCost:
    """t_g = launches + (weights / bandwidth + arithmetic) / g + 2 · layers · (latency_g + bytes / rate).

    Each rank reads 1/g of the weights and does 1/g of the arithmetic; every layer sums the activations twice, at a
    latency, and for the bytes of T tokens 2(g-1)/g · T · width · 2 over the links.
    """
    token = 2 * PARAMETERS / FLOPS / degree
    below = 0.1 * token
    sums, sent = 2 * LAYERS, 2 * (degree - 1) / degree * WIDTH * 2
    return StepCost(
        fixed=LAUNCHES + WEIGHTS_BYTES / BANDWIDTH / degree + sums * SUM_LATENCY[degree],
        token=below + sums * sent / SUM_RATE,
        bends=(token - below,),
        attention=ATTENTION_FLOPS / SOFTMAX_RATE / degree,
        projection=LOGITS / degree,
        row=1e-5,
        knots=(KNEE,),
    )


def law_for(steps: float, block: int = BLOCK) -> Law:
    """The geometric law under which a block takes so many steps in the mean; by bisection."""
    low, high = 1.0, float(BINS[-1])
    for _ in range(40):
        middle = (low + high) / 2
        law = pace(middle, 1000.0)
        low, high = (middle, high) if chain([law], block).steps[block] > steps else (low, middle)
    return law
