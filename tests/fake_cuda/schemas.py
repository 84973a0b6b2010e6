"""What the schemas of torch's operations say: names, and which arguments they change."""

import functools
from typing import NamedTuple

import torch

from fake_cuda.memory import tensors_of


class Form(NamedTuple):
    """What the schema of an operation says.

    `looks`: it only looks at its tensor's memory in another form; some of these copy where they must.
    """

    name: str
    arguments: tuple[str, ...]
    changed: tuple[str, ...]
    looks: bool


@functools.cache
def form_of(func):
    arguments = func._schema.arguments
    changed = tuple(one.name for one in arguments if one.alias_info and one.alias_info.is_write)
    looks = any(one.alias_info and not one.alias_info.is_write for one in arguments)
    return Form(func._schema.name.split("::")[1], tuple(one.name for one in arguments), changed, looks)


def writes_of(func, args, kwargs):
    """The tensors among its arguments that an operation changes."""
    form = form_of(func)
    if not form.changed:
        return []
    said = dict(zip(form.arguments, args, strict=False)) | kwargs
    return tensors_of([said.get(name) for name in form.changed])


def parts_written(func, args, inner):
    """An operation that is told a few rows writes only those."""
    if func is torch.ops.aten.index_copy_.default and len(args[2]) <= 4:
        return [inner.select(args[1], int(row)) for row in args[2]]
    return [inner]
