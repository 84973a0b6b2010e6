"""The functions of torch.cuda on a fake machine."""

import contextlib
from types import SimpleNamespace

import torch

from fake_cuda.streams import Event, Graph, Stream


def torch_cuda(machine):
    """What torch.cuda offers, for the fake machine."""

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
        name="Fake GPU", total_memory=machine.memory, major=9, minor=0, multi_processor_count=132
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
