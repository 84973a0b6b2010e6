"""Trees of tensors, the bytes that they reach, and how garbage gets there."""

import torch


def tensors_of(tree):
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, torch.Tensor)]


def leaves_of(tree):
    """What lies in tuples, lists and dictionaries; those of torch's own library take three times as long."""
    if isinstance(tree, tuple | list):
        for one in tree:
            yield from leaves_of(one)
    elif isinstance(tree, dict):
        yield from leaves_of([*tree.values()])
    else:
        yield tree


def mapped(change, tree):
    """The same tuples, lists and dictionaries with other leaves."""
    if isinstance(tree, tuple | list):
        return type(tree)([mapped(change, one) for one in tree])
    if isinstance(tree, dict):
        return {key: mapped(change, one) for key, one in tree.items()}
    return change(tree)


def storage_of(inner):
    return inner.untyped_storage().data_ptr()


def extent(inner):
    """The bytes that a CPU tensor may reach: the first, and the one after the last."""
    reach = sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True))
    return inner.data_ptr(), inner.data_ptr() + (reach + 1) * inner.element_size()


def bits(inner):
    return inner.contiguous().view(torch.uint8)


@torch.inference_mode()
def fill_with_garbage(inners):
    """Fill with what no program would take for a result."""
    for inner in inners:
        if inner.dtype.is_floating_point or inner.dtype.is_complex:
            inner.fill_(float("nan"))
        elif inner.dtype != torch.bool:
            inner.fill_(torch.iinfo(inner.dtype).min)
