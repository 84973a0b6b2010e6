"""Profiles from data sheets: what a model's config.json says that a step must read and compute, on a card's figures.

Nothing here was measured on the model at hand. It knows no traffic and no engine.
"""

from typing import NamedTuple

import msgspec

from dilaserve import models
from dilaserve.errors import ConfigError
from dilaserve.models.spec import ModelSpec
from dilaserve.profile.decode_speed import ANY, PARTS, QualityProfile, TaskProfile
from dilaserve.profile.profile_file import ModelProfile, cost_key
from dilaserve.profile.step_cost import DENSE, ExpertCounts, StepCost
from dilaserve.sim.h200 import law_for
from dilaserve.sim.published import FOLDER, NAMES
from dilaserve.types import FamilyTraits

ELEMENT = 2  # bytes of a weight and of an element of K/V, in bfloat16
BLOCK = 32  # tokens of a block, where a family was not trained with another


class Card(NamedTuple):
    """A device by its data sheet, and the shares of its peaks that kernels of these kinds reach.

    `latency` are the seconds of a small all-reduce by degree, `links` the bytes a second that a large one moves,
    `launches` the seconds of a step outside the kernels.
    """

    name: str
    bandwidth: float  # bytes a second
    flops: float  # operations a second, dense bfloat16
    latency: dict[int, float]
    links: float
    launches: float = 0.7e-3
    reading: float = 0.85  # of the bandwidth, by products that read weights
    products: float = 0.6  # of the operations, by large products
    softmax: float = 0.35  # of the operations, by attention
    hidden: float = 0.1  # share of a token's arithmetic that shows while reading the weights takes longer


H200 = Card("NVIDIA H200", 4.8e12, 989e12, {1: 0.0, 2: 9e-6, 4: 11e-6, 8: 14e-6}, 350e9)


class Decoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was published of a model's decoding: tokens a step and accuracy in % by confidence threshold."""

    model: str
    source: str
    levels: tuple[float, ...]
    tokens_per_step: tuple[float, ...]
    accuracy: tuple[float, ...] = ()


class Pretended(NamedTuple):
    """A model that is simulated: its profile, how its family behaves, and the degrees that its heads allow."""

    profile: ModelProfile
    traits: FamilyTraits = FamilyTraits()
    degrees: tuple[int, ...] = (1, 2, 4, 8)


def pretended_model(name: str, card: Card = H200) -> Pretended:
    """The model of this name in `published`; raises `ConfigError` for a name that has none."""
    if name not in NAMES:
        raise ConfigError(f"there are no published figures of {name!r}, only of {', '.join(NAMES)}")
    spec = models.outline(FOLDER / name)
    decoding = msgspec.json.decode((FOLDER / name / "decoding.json").read_bytes(), type=Decoding)
    profile = ModelProfile(
        model=decoding.model,
        made=f"from data sheets; {decoding.source}",
        machine=card.name,
        costs={cost_key("cuda", degree): step_cost(spec, degree, card) for degree in spec.degrees},
        quality=quality(decoding, spec.traits.block_length or BLOCK),
        measured=False,
    )
    return Pretended(profile, spec.traits, spec.degrees)


def quality(decoding: Decoding, block: int) -> QualityProfile:
    """Where no accuracy was published, no drop is known, and thresholds must not be lowered: there is one level."""
    most = max(decoding.accuracy, default=0.0)
    drops = tuple(max(0.0, decoding.accuracy[0] - one) for one in decoding.accuracy) or (0.0,) * len(decoding.levels)
    laws = tuple((law_for(block / tokens, block),) * PARTS for tokens in decoding.tokens_per_step)
    task = TaskProfile(laws=laws, drop=drops, mean_drop=drops, accuracy=most or None)
    return QualityProfile(tasks={ANY: task}, block_length=block, levels=decoding.levels)


class Weights(NamedTuple):
    """Parameters by when a pass reads them: in every step, in one expert of all layers, and of the head."""

    body: int
    expert: int
    head: int


def weights(spec: ModelSpec) -> Weights:
    """The embedding is a table from which only some rows are read; a tied head is read whole."""
    table = spec.vocab_size * spec.hidden
    routed, expert = spec.experts, 0
    if routed is not None:
        expert = 3 * spec.hidden * routed.width * (spec.layers - len(routed.dense))
    stored = table if spec.tied else 2 * table
    return Weights(spec.parameters - stored - expert * (routed.count if routed else 0), expert, table)


def step_cost(spec: ModelSpec, degree: int, card: Card) -> StepCost:
    """t = launches + sums + max(reading, arithmetic) + attention + K/V + head, piecewise linear in the packed tokens.

    Each rank reads 1/g of the weights and does 1/g of the arithmetic, two operations a parameter and token. Every layer
    sums the activations twice: a latency, and for a token 2(g-1)/g · width elements over the links. Arithmetic shows
    from the number of tokens on at which it takes as long as reading.
    """
    body, expert, head = weights(spec)
    routed = spec.experts
    reads, computes = card.reading * card.bandwidth * degree, card.products * card.flops * degree
    chosen = routed.chosen if routed else 0
    token, read_expert = 2 * (body + chosen * expert) / computes, ELEMENT * expert / reads
    reading = ELEMENT * (body + head) / reads
    knee = max(1, round((reading + read_expert * (routed.count if routed else 0)) / token))
    sums, sent = 2 * spec.layers, 2 * (degree - 1) / degree * spec.hidden * ELEMENT
    return StepCost(
        fixed=card.launches + reading + sums * card.latency[degree],
        token=card.hidden * token + sums * sent / card.links,
        bends=((1 - card.hidden) * token,),
        knots=(knee,),
        attention=4 * spec.layers * spec.heads * spec.head_dim / (card.softmax * card.flops * degree),
        key=ELEMENT * spec.kv_elements / reads,
        projection=2 * head / computes + 10 * spec.vocab_size / reads,
        row=1e-5,
        expert=read_expert,
        experts=ExpertCounts(routed.count, routed.chosen) if routed else DENSE,
    )
