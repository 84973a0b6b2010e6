"""All fake devices of one process: memory, time, and the operations that run on them."""

from collections import Counter, defaultdict

import torch

from fake_cuda.memory import bits, extent, fill_with_garbage, leaves_of, mapped, storage_of, tensors_of
from fake_cuda.schemas import form_of, parts_written, writes_of
from fake_cuda.streams import Access, Clock, Flight, Race, Stream
from fake_cuda.tensors import FakeTensor, inner_of

WAITING = {"item", "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique"}


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

    def release(self, held):
        self.users[held.storage] -= 1
        if self.users[held.storage]:
            return
        self.allocated[held.index] -= held.nbytes
        owner = self.owners.pop(held.storage)  # it may be given the memory again at once
        for access in self.accesses.pop(held.storage, ()):
            if access.stream is not owner and not self.certain(access, owner.clock):
                self.broken = "memory was freed while another stream used it"

    def new(self, inner, index):
        """A fake tensor; raises `OutOfMemoryError` where there is no room for it."""
        more = 0 if self.users[storage_of(inner)] else inner.untyped_storage().nbytes()
        if self.allocated[index] + more > self.memory - self.elsewhere:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.allocated[index]} bytes and {more} more")
        return FakeTensor(inner, index, self)

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
        for inner in tensors_of((args, kwargs)):
            if not any(inner is one for one in written):
                self.touch(inner, count, writes=False)
        for inner in written:
            for part in parts_written(func, args, inner):
                self.touch(part, count, writes=True)

    # operations

    def run(self, func, args, kwargs):
        leaves = list(leaves_of((args, kwargs)))
        mine = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == "cuda"), None)
        if not mine and target is None:
            return self.on_host(func, args, kwargs)
        name = form_of(func).name
        if name == "copy_":
            return self.copied(*args, **kwargs)
        if name in ("to", "_to_copy"):
            return self.moved(func, args, kwargs)
        indices = {one.held.index for one in mine} | ({target.index or 0} if target else set())
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)]
        others = [leaf for leaf in others if leaf.dim()]
        if len(indices) > 1 or (others and name not in ("index", "index_put_")):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if others:
            self.outside_capture("indices of the host")
        by_mask = name.startswith("index") and any(one.dtype == torch.bool for one in tensors_of(args[1:2]))
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
        faces = {id(one.held.inner): one for one in tensors_of((args, kwargs)) if isinstance(one, FakeTensor)}
        args, kwargs = mapped(inner_of, (args, kwargs))
        kwargs.pop("pin_memory", None)
        written = writes_of(func, args, kwargs)
        if self.graph is not None:
            self.graph.before += [(inner, inner.clone()) for inner in written]
        looks = form_of(func).looks
        if not looks:
            self.account(func, args, kwargs)
        given = {storage_of(inner) for inner in tensors_of((args, kwargs))}
        out = func(*args, **kwargs)
        made = [inner for inner in tensors_of(out) if storage_of(inner) not in given]
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
        for target, value in zip(tensors_of(out), tensors_of(func(*args, **kwargs)), strict=True):
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)

    @torch.inference_mode()
    def launched(self, kernel, args):
        """A kernel of Triton, interpreted."""
        args = mapped(inner_of, args)
        if self.graph is not None:
            self.graph.before += [(inner, inner.clone()) for inner in tensors_of(args)]
            self.graph.calls.append((self.ran, kernel, args))
        self.ran(kernel, args)

    def ran(self, kernel, args):
        """What it wrote is where its tensors are others than before."""
        count, inners = self.stream.begin(), tensors_of(args)
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
        if isinstance(target, FakeTensor) and isinstance(source, FakeTensor):
            return self.done(copy, (target, source), {}, target.held.index)
        self.outside_capture("a copy from or to the host")
        host = source if isinstance(target, FakeTensor) else target
        quick, value = non_blocking and self.is_pinned(host), inner_of(source).clone()
        if isinstance(target, FakeTensor):
            self.done(copy, (target, value), {}, target.held.index)
            if quick:
                self.leaving.append(Flight(self.stream, self.stream.clock[self.stream], host, value))
            elif self.is_pinned(host):
                self.stream.synchronize()
            return target
        count = self.stream.begin()
        self.touch(source.held.inner, count, writes=False)
        if quick:
            fill_with_garbage([host])
            self.landing.append(Flight(self.stream, count, host, value))
        else:
            self.stream.synchronize()
            host.copy_(value)
        return target
