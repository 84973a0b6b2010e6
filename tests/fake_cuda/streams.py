"""Streams, events and captured graphs: who has certainly done what, by vector clocks."""

from collections import Counter
from typing import NamedTuple

import torch

from fake_cuda.memory import fill_with_garbage
from fake_cuda.schemas import form_of


class Race(AssertionError):
    """Something was used before it was certainly there, or changed or freed while it was still in use."""


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
        fill_with_garbage(self.made)

    @torch.inference_mode()
    def replay(self):
        self.machine.outside_capture("a replay")
        for call, *given in self.calls:
            call(*given)
        fill_with_garbage(self.made)


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
