"""What reads and computes each kind of layers. Apart from the list of families, which needs no torch."""

from collections.abc import Callable
from typing import NamedTuple

from dilaserve.models import gemma_weights, weights
from dilaserve.models.gemma_transformer import GemmaModel
from dilaserve.models.transformer import Model
from dilaserve.models.weights import Weights


class Layers(NamedTuple):
    """How the tensors of a kind of layers are read, and what computes them."""

    load: Callable[..., Weights]
    model: type[Model]


LAYERS = {"llama": Layers(weights.load, Model), "gemma": Layers(gemma_weights.load, GemmaModel)}
