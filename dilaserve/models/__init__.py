"""Model families. Each module knows one architecture: its fields, its tensors, its forward pass. None knows another."""

from types import ModuleType

from dilaserve.errors import CheckpointError
from dilaserve.models import llada
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.spec import ModelSpec

FAMILIES: dict[str, ModuleType] = {"LLaDAModelLM": llada}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """What the checkpoint is, after checking that its tensors are all there with the right shapes.

    Reads headers only. Raises `CheckpointError`.
    """
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.directory} has the architecture {checkpoint.architecture!r}; "
            f"this version serves {', '.join(FAMILIES)}"
        )
    spec: ModelSpec = family.describe(checkpoint)
    checkpoint.expect(family.tensors(spec))
    return spec
