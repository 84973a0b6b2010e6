"""The planner in a process of its own, so that the loop never waits for the interpreter's lock. Blocks its caller."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Self

from dilaserve.planner.planner import Advice, Planner, Setup
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.step_cost import StepCost
from dilaserve.system import child_processes
from dilaserve.types import Demand, PlanReady

News = tuple[dict[int, StepCost], QualityProfile]
PATIENCE = 60.0  # seconds until an answer is given up, the start of a new process included
MODEST = 10  # added to the niceness of the process, so that serving goes first


class PlannerGone(Exception):
    """The planner's process has died, or has not answered in time."""


class PlannerProcess:
    """Ask it from a thread: `await asyncio.to_thread(advisor, demand)`.

    The process ends when the advisor is closed, or its parent dies. One that died is started anew by the next question.
    """

    def __init__(self, laws: Mapping[int, StepCost], quality: QualityProfile, setup: Setup) -> None:
        self.news, self.setup = (dict(laws), quality), setup
        self.process: subprocess.Popen[bytes] | None = None
        self.turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def learned(self, laws: Mapping[int, StepCost], quality: QualityProfile) -> None:
        """Plan with these laws from the next question on."""
        with self.turn:
            self.news = dict(laws), quality
            if self.process:
                with contextlib.suppress(OSError):
                    self.pipe.send(self.news)

    def __call__(self, demand: Demand) -> PlanReady:
        """Raises `PlannerGone`."""
        advice = self.advise(demand)
        if advice is None:
            raise PlannerGone("the planner's process has died or does not answer; the next question starts another")
        return PlanReady(advice.plan, advice.reason)

    def advise(self, demand: Demand) -> Advice | None:
        """None: the process has died or does not answer."""
        with self.turn:
            try:
                if self.process is None:
                    self.start()
                self.pipe.send(demand)
                if self.pipe.poll(PATIENCE):
                    answer: Advice = self.pipe.recv()
                    return answer
            except (OSError, EOFError):
                pass
            self.end()
            return None

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        self.pipe: Connection[Demand | News, Advice] = Connection(ours.detach())
        with Connection(child_processes.heritable(theirs.detach())) as end:
            arguments = (end.fileno(), self.news, self.setup)
            self.process = child_processes.start("dilaserve planner", live, arguments, self.pipe, [end.fileno()])

    def close(self) -> None:
        with self.turn:
            self.end()

    def end(self) -> None:
        if process := self.process:
            self.process = None
            self.pipe.close()
            child_processes.end(process)


def live(fd: int, news: News, setup: Setup) -> None:
    """Answer until the pipe of questions is closed."""
    pipe: Connection[Advice, Demand | News] = Connection(fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(MODEST)
    planner = Planner(*news, setup)
    with contextlib.suppress(EOFError, OSError):
        while True:
            match pipe.recv():
                case Demand() as demand:
                    pipe.send(planner.advise(demand))
                case laws, quality:
                    planner.learned(laws, quality)
