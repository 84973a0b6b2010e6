"""A fake CUDA device on the CPU: code for GPUs runs its CUDA paths there and computes the CPU's numbers.

A tensor on `cuda:N` holds a CPU tensor. Each operation is done when it is called. A result still counts as done only
once a real device would have to have done it (happens-before, by vector clocks of streams, events and the host):

- tensors of two devices never meet in an operation;
- what a stream writes is used by another, and what it uses is freed, only behind an event or a wait;
- pinned memory that a copy fills holds garbage until the host has waited, and one that a copy reads must not change;
- while a graph is captured nothing runs and nothing waits; a replay does the same again on the same memory, and what
  lies in the memory of a graph is garbage to everybody else;
- memory ends: an allocation beyond it raises `OutOfMemoryError`.

`fake_gpus(devices)` does it for a block of one process, `install(devices)` for the rest of a process's life. This does
it for a program and the worker processes that it starts:

    python tests/fake_cuda 2 -m dilaserve --devices cuda:0,cuda:1
"""

from fake_cuda.installing import fake_gpus, for_workers, install, steps_of_a_gpu
from fake_cuda.streams import Event, Race, Stream

__all__ = ["Event", "Race", "Stream", "fake_gpus", "for_workers", "install", "steps_of_a_gpu"]
