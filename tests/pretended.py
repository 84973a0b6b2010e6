"""A CUDA device that is pretended on the CPU: code for GPUs takes its own roads there and computes the CPU's numbers.

A tensor on `cuda:N` holds a CPU tensor. All work is done when it is asked for, yet nothing is taken for done before a
real device would have to have done it (happens-before, by vector clocks of streams, events and the host):

- tensors of two devices never meet in an operation;
- what a stream writes is used by another, and what it uses is freed, only behind an event or a wait;
- pinned memory that a copy fills holds garbage until the host has waited, and one that a copy reads must not change;
- while a graph is captured nothing runs and nothing waits; a replay does the same again on the same memory, and what
  lies in the memory of a graph is garbage to everybody else;
- there is only so much memory.

`pretend(devices)` does it for a block of one process, `install(devices)` for the rest of a process's life. This does it
for a program and the worker processes that it starts:

    python tests/pretended.py 2 -m dilaserve --devices cuda:0,cuda:1
"""

import atexit
import contextlib
import ctypes
import datetime
import functools
import os
import runpy
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
CUDA = 1  # of c10's device types
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
WAITING = {"item", "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique"}
MACHINES = []  # the last one is there now


class Race(AssertionError):
    """Something was used before it was certainly there, or changed or freed while it was still in use."""


class Held:
    """The CPU tensor behind a pretended one; tells the machine when it is gone."""

    def __init__(self, inner, index, machine):
        self.inner, self.index, self.machine = inner, index, machine
        self.storage, self.nbytes = storage_of(inner), inner.untyped_storage().nbytes()
        machine.holds(self)

    def __del__(self):
        self.machine.lets_go(self)


class Pretended(torch.Tensor):
    """What says that it lies on a GPU."""

    @staticmethod
    def __new__(cls, inner, index, machine):
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), **form, device=torch.device("cuda", index), requires_grad=False
            )
        self.held = Held(inner, index, machine)
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return MACHINES[-1].run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        raise TypeError("can't convert a CUDA tensor to numpy; copy it to the host first")

    def __repr__(self):
        return f"Pretended({self.held.inner!r}, cuda:{self.held.index})"


class Mode(TorchDispatchMode):
    """What torch does without a tensor of the device, but for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return MACHINES[-1].run(func, args, kwargs or {})


class Clock(Counter):
    """How much of each stream is done; `|=` joins another clock."""

    def __ior__(self, other):
        for stream, count in other.items():
            if count > self[stream]:
                self[stream] = count
        return self


class Stream:
    """`clock` says how much of each stream is done before what is put on this one next."""

    def __init__(self, machine, index):
        self.machine, self.index, self.clock = machine, index, Clock()
        machine.streams.append(self)

    def begin(self):
        """Put something on the stream; returns its number."""
        self.clock |= self.machine.known
        self.clock[self] += 1
        return self.clock[self]

    def wait_event(self, event):
        self.machine.outside_capture("waiting for an event")
        self.clock |= event.clock

    def wait_stream(self, other):
        self.machine.outside_capture("waiting for another stream")
        self.clock |= other.clock

    def synchronize(self):
        self.machine.wait(self.clock)


class Event:
    def __init__(self, machine):
        self.machine, self.clock = machine, Clock()

    def record(self, stream=None):
        self.machine.outside_capture("recording an event")
        self.clock = (stream or self.machine.stream).clock.copy()

    def synchronize(self):
        self.machine.wait(self.clock)


class Graph:
    """What was asked for while it was captured, to be done again."""

    def __init__(self, machine):
        self.machine, self.memory = machine, object()
        self.calls, self.made, self.before = [], [], []

    def pool(self):
        return self.memory

    @property
    def launches(self):
        """What a replay launches, by name; whatever only takes memory is none."""
        names = [getattr(func, "_schema", None) and form_of(func).name for _, func, *_ in self.calls]
        return Counter(name or "kernel" for name in names if name not in ("empty", "empty_like"))

    @torch.inference_mode()
    def end(self):
        """Nothing has run: what was written is as before, what was made holds nothing."""
        for inner, value in reversed(self.before):
            inner.copy_(value)
        self.before.clear()
        spoil(self.made)

    @torch.inference_mode()
    def replay(self):
        self.machine.outside_capture("a replay")
        for call, *given in self.calls:
            call(*given)
        spoil(self.made)


class Access:
    """Who uses which bytes, and when."""

    __slots__ = ("count", "end", "first", "stream", "writes")

    def __init__(self, first, end, stream, count, writes):
        self.first, self.end, self.stream, self.count, self.writes = first, end, stream, count, writes


class Flight(NamedTuple):
    """A copy between pinned memory and a device; `value` is what went."""

    stream: Stream
    count: int
    host: torch.Tensor
    value: torch.Tensor


class Machine:
    """All devices of one process."""

    def __init__(self, devices, memory):
        self.devices, self.memory = devices, memory
        self.streams = []
        self.defaults = [Stream(self, index) for index in range(devices)]
        self.stream = self.defaults[0]
        self.known = Clock()  # what the host knows to be done
        self.accesses = defaultdict(list)  # of each storage
        self.users = Counter()  # tensors of each storage
        self.owners = {}  # the stream for which each storage was allocated
        self.allocated, self.peak = [0] * devices, [0] * devices
        self.elsewhere = 0  # bytes of each device that other processes have
        self.reserved = Counter()  # bytes of each memory of graphs
        self.pinned, self.kept = (
            [],
            [],
        )  # extents of memory, and what must not go so that they stay nobody else's
        self.landing, self.leaving = [], []  # copies to the host and from it
        self.graph = self.broken = None
        self.pins, self.left = True, None  # whether memory can be pinned, and the error that a call has left behind

    # memory

    def holds(self, held):
        self.users[held.storage] += 1
        if self.users[held.storage] > 1:
            return
        self.owners[held.storage] = self.stream
        self.allocated[held.index] += held.nbytes
        self.peak[held.index] = max(self.peak[held.index], self.allocated[held.index])

    def lets_go(self, held):
        self.users[held.storage] -= 1
        if self.users[held.storage]:
            return
        self.allocated[held.index] -= held.nbytes
        owner = self.owners.pop(held.storage)  # it may be given the memory again at once
        for access in self.accesses.pop(held.storage, ()):
            if access.stream is not owner and not self.certain(access, owner.clock):
                self.broken = "memory was freed while another stream used it"

    def new(self, inner, index):
        """A pretended tensor; raises `OutOfMemoryError` where there is no room for it."""
        more = 0 if self.users[storage_of(inner)] else inner.untyped_storage().nbytes()
        if self.allocated[index] + more > self.memory - self.elsewhere:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.allocated[index]} bytes and {more} more")
        return Pretended(inner, index, self)

    def is_pinned(self, inner):
        first, end = extent(inner)
        return any(low <= first and end <= high for low, high in self.pinned)

    # time

    def certain(self, access, clock):
        return max(clock[access.stream], self.known[access.stream]) >= access.count

    @torch.inference_mode()
    def wait(self, clock):
        """The host waits for all that the clock has."""
        self.outside_capture("a wait of the host")
        self.known |= clock
        for flight in self.done_of(self.landing):
            flight.host.copy_(flight.value)
        for flight in self.done_of(self.leaving):
            if not torch.equal(bits(flight.host), bits(flight.value)):
                raise Race("pinned memory was changed before it was copied to the device")

    def done_of(self, flights):
        """Take out what the host knows to be done."""
        done = [flight for flight in flights if self.known[flight.stream] >= flight.count]
        flights[:] = [flight for flight in flights if self.known[flight.stream] < flight.count]
        return done

    def wait_all(self, device=None):
        for stream in self.streams:
            self.wait(stream.clock)

    def outside_capture(self, what):
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def touch(self, inner, count, writes):
        """Note a use by the current stream; raises `Race` where another may not be through with it."""
        if not inner.numel():
            return
        first, end = extent(inner)
        kept = [Access(first, end, self.stream, count, writes)]
        for access in self.accesses[storage_of(inner)]:
            if self.known[access.stream] >= access.count:
                continue
            if access.stream is self.stream:
                if (access.first, access.end, access.writes) != (first, end, writes):
                    kept.append(access)
                continue
            kept.append(access)
            meets = access.first < end and first < access.end and (writes or access.writes)
            if meets and not self.certain(access, self.stream.clock):
                raise Race(f"a tensor {list(inner.shape)} is used while another stream still uses it")
        self.accesses[storage_of(inner)] = kept

    def account(self, func, args, kwargs):
        """Note what an operation reads and writes, of the CPU tensors that it is given."""
        if self.broken:
            raise Race(self.broken)
        if self.left:
            left, self.left = self.left, None
            raise RuntimeError(left)
        count, written = self.stream.begin(), writes_of(func, args, kwargs)
        for inner in tensors((args, kwargs)):
            if not any(inner is one for one in written):
                self.touch(inner, count, writes=False)
        for inner in written:
            for part in parts_written(func, args, inner):
                self.touch(part, count, writes=True)

    # operations

    def run(self, func, args, kwargs):
        leaves = list(leaves_of((args, kwargs)))
        mine = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == "cuda"), None)
        if not mine and target is None:
            return self.on_host(func, args, kwargs)
        name = form_of(func).name
        if name == "copy_":
            return self.copied(*args, **kwargs)
        if name in ("to", "_to_copy"):
            return self.moved(func, args, kwargs)
        indices = {one.held.index for one in mine} | ({target.index or 0} if target else set())
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretended)]
        others = [leaf for leaf in others if leaf.dim()]
        if len(indices) > 1 or (others and name not in ("index", "index_put_")):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if others:
            self.outside_capture("indices of the host")
        by_mask = name.startswith("index") and any(one.dtype == torch.bool for one in tensors(args[1:2]))
        if name in WAITING or by_mask:
            self.stream.synchronize()
        return self.done(func, args, kwargs, indices.pop())

    def on_host(self, func, args, kwargs):
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if pinned:
            self.pinned.append(extent(out))
            self.kept.append(out)
        return out

    @torch.inference_mode()
    def done(self, func, args, kwargs, index):
        """An operation of one device, on the CPU."""
        faces = {id(one.held.inner): one for one in tensors((args, kwargs)) if isinstance(one, Pretended)}
        args, kwargs = mapped(inner_of, (args, kwargs))
        kwargs.pop("pin_memory", None)
        written = writes_of(func, args, kwargs)
        if self.graph is not None:
            self.graph.before += [(inner, inner.clone()) for inner in written]
        looks = form_of(func).looks
        if not looks:
            self.account(func, args, kwargs)
        given = {storage_of(inner) for inner in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        made = [inner for inner in tensors(out) if storage_of(inner) not in given]
        if looks and made:
            self.account(func, args, kwargs)
        for inner in made:
            self.touch(inner, self.stream.clock[self.stream], writes=True)
        if self.graph is not None and (made or not looks):
            self.graph.calls.append((self.done_again, func, args, kwargs, out))
            self.graph.made += made

        def face(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return faces[id(leaf)] if id(leaf) in faces else self.new(leaf, index)

        return mapped(face, out)

    def done_again(self, func, args, kwargs, out):
        """An operation of a graph that is replayed; its results go where they went when it was captured."""
        self.account(func, args, kwargs)
        for target, value in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)

    @torch.inference_mode()
    def launched(self, kernel, args):
        """A kernel of Triton, interpreted."""
        args = mapped(inner_of, args)
        if self.graph is not None:
            self.graph.before += [(inner, inner.clone()) for inner in tensors(args)]
            self.graph.calls.append((self.ran, kernel, args))
        self.ran(kernel, args)

    def ran(self, kernel, args):
        """What it wrote is where its tensors are others than before."""
        count, inners = self.stream.begin(), tensors(args)
        before = [bits(inner).clone() for inner in inners]
        for inner in inners:
            self.touch(inner, count, writes=False)
        kernel(*args)
        for inner, old in zip(inners, before, strict=True):
            changed = (bits(inner) != old).flatten().nonzero().flatten()
            if len(changed):
                flat = bits(inner).flatten()[int(changed[0]) : int(changed[-1]) + 1]
                self.touch(flat if inner.is_contiguous() else inner, count, writes=True)

    @torch.inference_mode()
    def moved(self, func, args, kwargs):
        """`Tensor.to` and its like, whatever their form."""
        said = dict(zip(form_of(func).arguments, args, strict=False)) | kwargs
        source, like = said["self"], said.get("other")
        device = said.get("device") or (like.device if like is not None else source.device)
        dtype = said.get("dtype") or (like.dtype if like is not None else source.dtype)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", self.stream.index)
        if device == source.device:
            if dtype == source.dtype and not said.get("copy") and form_of(func).name != "_to_copy":
                return source
            known = dict(dtype=dtype, memory_format=said.get("memory_format"))
            return self.done(torch.ops.aten._to_copy.default, (source,), known, device.index or 0)
        if dtype != source.dtype and source.device.type == "cuda":
            source = source.to(dtype)
        out = torch.empty_like(inner_of(source))
        if device.type == "cuda":
            out = self.new(out, device.index)
        elif said.get("non_blocking"):
            raise Race("a copy to the host for which nobody can wait")
        self.copied(out, source, bool(said.get("non_blocking")))
        return out.to(dtype)

    @torch.inference_mode()
    def copied(self, target, source, non_blocking=False):
        """`copy_`, between the host and a device or on one."""
        copy = torch.ops.aten.copy_.default
        if isinstance(target, Pretended) and isinstance(source, Pretended):
            return self.done(copy, (target, source), {}, target.held.index)
        self.outside_capture("a copy from or to the host")
        host = source if isinstance(target, Pretended) else target
        quick, value = non_blocking and self.is_pinned(host), inner_of(source).clone()
        if isinstance(target, Pretended):
            self.done(copy, (target, value), {}, target.held.index)
            if quick:
                self.leaving.append(Flight(self.stream, self.stream.clock[self.stream], host, value))
            elif self.is_pinned(host):
                self.stream.synchronize()
            return target
        count = self.stream.begin()
        self.touch(source.held.inner, count, writes=False)
        if quick:
            spoil([host])
            self.landing.append(Flight(self.stream, count, host, value))
        else:
            self.stream.synchronize()
            host.copy_(value)
        return target


def inner_of(leaf):
    """What an operation is given on the CPU in place of this."""
    if isinstance(leaf, Pretended):
        return leaf.held.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def tensors(tree):
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
def spoil(inners):
    """Fill with what no program would take for a result."""
    for inner in inners:
        if inner.dtype.is_floating_point or inner.dtype.is_complex:
            inner.fill_(float("nan"))
        elif inner.dtype != torch.bool:
            inner.fill_(torch.iinfo(inner.dtype).min)


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
    return tensors([said.get(name) for name in form.changed])


def parts_written(func, args, inner):
    """An operation that is told a few rows writes only those."""
    if func is torch.ops.aten.index_copy_.default and len(args[2]) <= 4:
        return [inner.select(args[1], int(row)) for row in args[2]]
    return [inner]


def flash(q, k, v, starts_q, starts_k, most_q, most_k, dropout, causal, debug, *, scale=None, seqused_k=None, **other):
    """aten::_flash_attention_forward over runs of different lengths, as CUDA's kernel reads its arguments."""
    assert (dropout, causal, debug) == (0.0, False, False)
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    numbers = [starts_q, starts_k] + ([] if seqused_k is None else [seqused_k])
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in numbers)
    assert [len(one) for one in numbers] == [len(starts_q), len(starts_q), len(starts_q) - 1][: len(numbers)]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    firsts, starts, ends = starts_q.tolist(), starts_k.tolist(), starts_k[1:].tolist()
    if seqused_k is not None:
        ends = [start + used for start, used in zip(starts, seqused_k.tolist(), strict=False)]
    out, log_sums = torch.full_like(q, float("nan")), torch.zeros(q.shape[1], len(q))
    for first, last, start, end in zip(firsts, firsts[1:], starts, ends, strict=False):
        assert last - first <= most_q
        assert end - start <= most_k
        assert end <= len(k)
        mine = (x.transpose(0, 1)[None].float() for x in (q[first:last], k[start:end], v[start:end]))
        grouped = q.shape[1] != k.shape[1]
        found = torch.nn.functional.scaled_dot_product_attention(*mine, scale=scale, enable_gqa=grouped)
        out[first:last] = found[0].transpose(0, 1).to(q.dtype)
    return out, log_sums, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(0, dtype=q.dtype)


ATEN = torch.library.Library("aten", "IMPL")
ATEN.impl("_flash_attention_forward", flash, "CPU")


class Gloo:
    """Gloo's process group, which takes tensors of a device through host memory and waits for the current stream."""

    real = getattr(torch.distributed, "ProcessGroupGloo", None)

    def __init__(self, *args):
        self.group = self.real(*args)

    def allreduce(self, given):
        return self.group.allreduce(self.opened(given))

    def allgather(self, out, given):
        return self.group.allgather([self.opened(one) for one in out], self.opened(given))

    def opened(self, given):
        MACHINES[-1].stream.synchronize()
        return [inner_of(one) for one in given]


class Nccl(Gloo):
    """NCCL's process group, as far as it can be told apart from here: no host learns that a peer is gone. The device
    waits until the group is aborted, and goes on with garbage.
    """

    def __init__(self, store, rank, size):
        super().__init__(store, rank, size, datetime.timedelta(minutes=30))
        self.aborted = threading.Event()

    def allreduce(self, given):
        return self.told_nothing(super().allreduce, given)

    def allgather(self, out, given):
        return self.told_nothing(super().allgather, out, given)

    def told_nothing(self, call, *given):
        try:
            call(*given).wait()
        except RuntimeError:
            self.aborted.wait()
            spoil(inner_of(leaf) for leaf in tensors(given[0]))
        return SimpleNamespace(wait=lambda: None)

    def abort(self):
        self.aborted.set()


@contextlib.contextmanager
def pretend(devices=1, memory=64 * GIB, kernels=False):
    """Whatever torch does in the block, in this thread, it does as if there were so many GPUs.

    `kernels`: Triton is there; it must have been imported so that it interprets. Else it is not there at all.
    """
    machine, lifted = Machine(devices, memory), torch._C._only_lift_cpu_tensors()
    torch.set_num_threads(1)  # what stands in for a kernel is small
    MACHINES.append(machine)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in faces(machine).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(interpreted(machine) if kernels else hidden("triton"))
            for name, value in dict(
                ProcessGroupGloo=Gloo, ProcessGroupNCCL=Nccl, is_nccl_available=lambda: True
            ).items():
                stack.enter_context(mock.patch.object(torch.distributed, name, value, create=True))
            torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device=…) asks to be moved there
            guard_nothing()
            stack.enter_context(Mode())
            yield machine
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        MACHINES.pop()


@contextlib.contextmanager
def hidden(name):
    """Let a module be none that is installed."""
    missing = object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = None
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not missing:
            sys.modules[name] = before


@contextlib.contextmanager
def interpreted(machine):
    """Let kernels of Triton run on the machine."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        machine.launched(lambda *given: run(executor, *given, **kwargs), args)

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


def guard_nothing():
    """Let CUDA's device guard be one that does nothing, also where torch was built without CUDA and so has none."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (CUDA + 1)).in_dll(library, GUARDS)
    guards[CUDA] = guards[CUDA] or guards[0]


def install(devices, memory=64 * GIB):
    """Pretend as long as this process lives."""
    FOREVER.enter_context(pretend(devices, memory))
    atexit.register(FOREVER.close)


FOREVER = contextlib.ExitStack()


def faces(machine):
    """What torch.cuda offers, in the form that is pretended."""

    @contextlib.contextmanager
    def on(stream):
        before, machine.stream = machine.stream, stream
        try:
            yield
        finally:
            machine.stream = before

    @contextlib.contextmanager
    def graph(captured, pool=None, stream=None, capture_error_mode="global"):
        machine.wait_all()
        with on(stream or Stream(machine, machine.stream.index)):
            index = machine.stream.index
            before, peak = machine.allocated[index], machine.peak[index]
            machine.peak[index] = before
            machine.graph, captured.memory = captured, pool or captured.memory
            try:
                yield
            finally:
                machine.graph = None
                captured.end()
                machine.wait_all()
                more = max(0, machine.peak[index] - before - machine.reserved[captured.memory])
                machine.reserved[captured.memory] += more
                machine.allocated[index] += more
                machine.peak[index] = max(peak, machine.peak[index])

    def index_of(device):
        device = machine.stream.index if device is None else device
        return device if isinstance(device, int) else torch.device(device).index or 0

    def use(device):
        machine.stream = machine.defaults[index_of(device)]

    def register(pointer, nbytes, flags):
        if not machine.pins:
            machine.left = "CUDA error: operation not permitted"
            return 800
        machine.pinned.append((pointer, pointer + nbytes))
        return 0

    def forget_peak(device=None):
        machine.peak[index_of(device)] = machine.allocated[index_of(device)]

    def free(device=None):
        return machine.memory - machine.elsewhere - machine.allocated[index_of(device)]

    properties = SimpleNamespace(
        name="Pretended GPU", total_memory=machine.memory, major=9, minor=0, multi_processor_count=132
    )
    return dict(
        _lazy_init=lambda: None,
        is_initialized=lambda: True,
        is_available=lambda: True,
        device_count=lambda: machine.devices,
        current_device=lambda: machine.stream.index,
        set_device=use,
        get_device_capability=lambda device=None: (properties.major, properties.minor),
        get_device_name=lambda device=None: properties.name,
        get_device_properties=lambda device=None: properties,
        mem_get_info=lambda device=None: (free(device), machine.memory),
        memory_allocated=lambda device=None: machine.allocated[index_of(device)],
        memory_reserved=lambda device=None: machine.allocated[index_of(device)],
        max_memory_allocated=lambda device=None: machine.peak[index_of(device)],
        reset_peak_memory_stats=forget_peak,
        empty_cache=lambda: None,
        synchronize=machine.wait_all,
        cudart=lambda: SimpleNamespace(cudaHostRegister=register),
        Stream=lambda device=None: Stream(machine, index_of(device)),
        Event=lambda: Event(machine),
        CUDAGraph=lambda: Graph(machine),
        current_stream=lambda device=None: machine.stream,
        stream=on,
        graph=graph,
    )


def for_workers(devices):
    """The environment in which worker processes pretend as well."""
    places = [str(Path(__file__).parent / "pretending"), os.environ.get("PYTHONPATH", "")]
    return {"PRETENDED_GPUS": str(devices), "PYTHONPATH": os.pathsep.join(filter(None, places))}


def main():
    """Run a module as `python -m` does, on so many GPUs."""
    count, flag, module, *rest = sys.argv[1:]
    assert flag == "-m", __doc__
    os.environ |= for_workers(int(count))
    sys.path.insert(0, os.getcwd())
    sys.argv = [module, *rest]
    with pretend(int(count)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.modules["pretended"] = sys.modules["__main__"]
    main()
