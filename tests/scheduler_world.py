"""Engine and workers played at random around a scheduler, which is watched at every event."""

import itertools
import random
from collections import Counter

import msgspec
from scheduler_builders import PAIRS, SINGLES, done, request, result, scheduler

from dilaserve.scheduler.invariants import violations
from dilaserve.scheduler.request_state import Status
from dilaserve.scheduler.rules.blocks import first_open, parts
from dilaserve.types import (
    Arrival,
    Cancel,
    Decline,
    Emit,
    Fail,
    Finish,
    InstanceLost,
    InstanceReady,
    Launch,
    Paused,
    Plan,
    Refuse,
    Release,
    Replan,
    Reshard,
    Slo,
    StopEarly,
    WorkerLost,
    WorkerUp,
)
from dilaserve.worker.model_runner import answered
from dilaserve.worker.multi_step import Courses

PLANS = (SINGLES, PAIRS, Plan(((0, 1), (2,), (3,))), Plan(((0, 1, 2, 3),)))


def opening(wanted):
    """The first position that is unmasked, or again if the client has it: all before are of whole blocks."""
    found = parts(wanted)
    return found[first_open(found, wanted.begin)].start


class World:
    """Plays engine and workers at random, and watches that nothing is lost, doubled or overlapped."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.settings = {
            "max_num_seqs": self.rng.randint(1, 5),
            "max_num_batched_tokens": self.rng.randint(1, 400),
            "scheduling": self.rng.choice(("fcfs", "edf", "least-slack", "composed", "composed", "composed")),
            "shed": self.rng.choice(("on", "off")),
            "threshold_control": self.rng.choice(("fixed", "slack", "slack+floor")),
            "accuracy_budget": self.rng.choice(("off", 0.9)),
            "guaranteed_rows": self.rng.randint(1, 4),
        }
        self.settings["repeats"] = self.rng.choice((1, 8))
        self.machine = scheduler(plan=SINGLES, **self.settings)
        self.driver = self.machine  # what observes and decides
        self.steps, self.courses = {}, {}  # by instance: taken by its batch, and what its rows do now and next
        self.stopped_early, self.begun = set(), set()  # instances told to hurry; those a step ahead of what they know
        self.in_flight, self.up, self.now, self.rows = {}, set(), 0.0, 0  # `up`: ranks
        self.instances, self.forming = {}, {}
        self.dying = {}  # instances of which a rank is gone: the ranks that have not left them yet, by id
        self.pools = self.rng.choice(((400,), (400, 224), (400, 200, 96)))  # tokens that workers come up with
        self.alive, self.ended, self.masks, self.log = set(), set(), {}, []
        self.told, self.timed = Counter(), 0  # last words to clients by kind; those about a deadline
        self.taken, self.refreshed = Counter(), Counter()  # steps and refreshes by row, as usage has them
        self.prefixes = {}  # by row, canvas positions that are final and that its client has or had before
        self.begins = {}  # by row, where its first open block begins

    def feed(self, event):
        self.now += self.rng.random()
        self.perform([*self.observe(event), *self.decide()])
        self.count()

    def observe(self, event):
        self.log.append(("observe", event, self.now))
        return list(self.driver.observe(event, self.now))

    def decide(self):
        self.log.append(("decide", self.now))
        return list(self.driver.decide(self.now))

    def count(self):
        """Every request is in the scheduler or has one fate, and the state is consistent."""
        machine = self.machine
        assert violations(machine) == []
        assert 0 <= machine.placement.running <= len(machine.requests)
        assert sum(machine.totals.fates.values()) == len(self.ended) == self.rows - len(machine.requests)

    def perform(self, commands):
        for command in commands:
            match command:
                case Launch(batch):
                    self.launched(batch)
                case StopEarly(batch):
                    assert self.in_flight[batch.instance] == batch
                    assert batch.instance not in self.stopped_early
                    self.stopped_early.add(batch.instance)
                case Finish(wanted) | Fail(wanted) | Decline(wanted) | Refuse(wanted):
                    self.told[type(command)] += 1
                    self.timed += wanted.slo.seconds is not None
                    assert wanted.id not in self.ended
                    self.ended.add(wanted.id)
                    if isinstance(command, Finish):
                        assert command.usage.resumed_tokens == wanted.resumed_tokens
                        assert command.reason == (wanted.ended or command.reason)
                        counts = command.usage.steps, command.usage.refreshes
                        assert counts == (self.taken[wanted.row], self.refreshed[wanted.row])
                case Emit(wanted, prefix):
                    assert self.prefixes[wanted.row] < prefix <= wanted.prompt_tokens + wanted.max_tokens
                    self.prefixes[wanted.row] = prefix
                case Release(row):
                    self.alive.remove(row)
                case Reshard(moves):
                    for id in moves.ends:
                        assert id not in self.in_flight
                        del self.instances[id]
                        self.dying.pop(id, None)
                    for instance in moves.begins:
                        others = [*self.instances.values(), *self.forming.values()]
                        assert not {rank for other in others for rank in other.ranks} & set(instance.ranks)
                        assert set(instance.ranks) <= self.up
                        self.forming[instance.id] = instance

    def launched(self, batch):
        assert batch.instance in self.instances
        assert batch.instance not in self.dying
        assert batch.instance not in self.in_flight
        rows = [span.row for span in batch.spans]
        busy = [span.row for other in self.in_flight.values() for span in other.spans]
        assert len(set(rows)) == len(rows)
        assert not set(rows) & set(busy)
        assert set(rows) <= self.alive
        assert all(span.block_start >= self.begins[span.row] for span in batch.spans)
        places = sorted((span.kv_start, span.kv_start + span.keys) for span in batch.spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
        self.in_flight[batch.instance] = batch
        self.courses[batch.instance] = Courses(batch.spans, batch.then)
        self.refreshed.update(span.row for span in batch.spans if self.refreshes(span))
        self.steps[batch.instance] = 0
        self.stopped_early.discard(batch.instance)
        self.begun.discard(batch.instance)

    def act(self):
        choice = self.rng.random()
        if choice < 0.3:
            wanted = self.request()
            self.alive.add(self.rows)
            self.prefixes[self.rows] = wanted.begin
            self.begins[self.rows] = None if wanted.ended else opening(wanted)
            self.rows += 1
            self.feed(Arrival(wanted))
        elif choice < 0.35 and self.rows:
            self.feed(Cancel(f"r{self.rng.randrange(self.rows)}", "cancelled"))
        elif choice < 0.40:
            self.toggle(self.rng.randrange(4))
        elif choice < 0.43:
            self.feed(Replan(self.rng.choice(PLANS), "asked"))
        elif choice < 0.45:
            self.feed(Paused(self.rng.choice((0.1, 5.0, 100.0))))
        elif choice < 0.48 and self.dying:
            self.lose(self.rng.choice(sorted(self.dying)))
        elif choice < 0.58 and (ready := sorted(self.forming.keys() - self.dying.keys())):
            self.form(self.rng.choice(ready))
        elif self.in_flight:
            self.finish(self.rng.choice(sorted(self.in_flight)))

    def request(self):
        prompt, answer = self.rng.randint(1, 60), self.rng.randint(1, 100)
        cache = self.rng.choice(("none", "prefix", "dual"))
        length = self.rng.choice((8, 32))
        wanted = request(self.rows, prompt, answer, self.now, self.slo(), cache=cache, block_length=length)
        return self.resumed(wanted)

    def resumed(self, wanted):
        """Some requests have come to another server before, and go on behind tokens which may have ended them."""
        if self.rng.random() < 0.7:
            return wanted
        count, elapsed = self.rng.randint(1, wanted.max_tokens), self.rng.choice((0.0, 0.5, 20.0))
        ended = "length" if count == wanted.max_tokens else self.rng.choice((None, None, None, "stop"))
        at = wanted.arrived_at - elapsed
        return msgspec.structs.replace(wanted, resumed_tokens=count, ended=ended, arrived_at=at, elapsed=elapsed)

    def refreshes(self, span):
        return span.length == span.keys

    def slo(self):
        seconds = self.rng.choice((None, None, 0.001, 1.0, 5.0, 100.0))
        on_miss = self.rng.choice(("best_effort", "best_effort", "reject", "cancel_when_late"))
        return Slo(seconds=seconds, on_miss=on_miss, weight=self.rng.choice((1.0, 4.0)), tenant=self.rng.choice("ab"))

    def toggle(self, rank):
        if rank not in self.up:
            self.up.add(rank)
            self.feed(WorkerUp(rank, self.rng.choice(self.pools)))
            return
        self.up.remove(rank)
        self.observe(WorkerLost(rank, "killed"))
        for id, instance in [*self.instances.items(), *self.forming.items()]:
            if rank in instance.ranks and (id in self.instances or id in self.forming):
                staying = self.dying.setdefault(id, set(instance.ranks))
                staying.discard(rank)
                if not staying or self.rng.random() < 0.5:
                    self.lose(id)
        self.perform(self.decide())

    def lose(self, id):
        """All ranks that live on have left the instance. What its last step wrote stays, reported or not."""
        if id in self.in_flight and self.rng.random() < 0.5:
            for span in self.courses[id].spans:
                before = self.masks.get(key := (span.row, span.block_start), span.block_end - span.block_start)
                self.masks[key] = max(0, before - self.rng.choice((1, 8, 32)))
        for there in (self.instances, self.forming, self.in_flight, self.dying):
            there.pop(id, None)
        self.feed(InstanceLost(id, "killed", outside=self.rng.random() < 0.5))

    def form(self, id):
        self.instances[id] = self.forming.pop(id)
        self.feed(InstanceReady(self.instances[id]))

    def finish(self, instance):
        """One step; where all rows reuse, another may have begun before this one's result was known."""
        batch, courses, results = self.in_flight[instance], self.courses[instance], []
        spans, replica = (
            courses.spans,
            self.machine.placement.replicas.get(instance) or self.machine.placement.closing[instance],
        )
        there = [progress.status is not Status.LEAVING for progress in replica.in_flight]
        self.stepped(instance, spans)
        for span, stage, here in zip(spans, courses.stages, there, strict=True):
            key = (span.row, span.block_start)
            before = self.masks.get(key, span.block_end - span.block_start)
            left = self.masks[key] = max(0, before - self.rng.randint(1, 8))
            chunk = span.block_start == span.block_end
            stops = not chunk and self.rng.random() < 0.1
            stop_at = self.rng.randrange(span.block_start, span.block_end) if stops else -1
            rested = not before and instance in self.begun
            results.append(result(span, left, span.block_end - left, stop_at, before - left, stage, rested))
            if chunk:
                del self.masks[key]
            elif here and not rested:
                self.taken[span.row] += 1
                self.refreshed[span.row] += self.steps[instance] > 0 and self.refreshes(span)
        self.reported(spans, results)
        self.steps[instance] += 1
        last = self.steps[instance] == batch.steps
        over = answered(results) or instance in self.stopped_early
        ends = over or not all(one.masks_left for one in results)
        begins = not last and instance not in self.begun and not any(map(self.refreshes, spans))
        if ends and begins and self.rng.random() < 0.5:
            self.begun.add(instance)
            self.feed(done(batch, results, last=False))
            return
        self.begun.discard(instance)
        last = last or over or not courses.follow(results)
        tokens = sum(span.length for span in courses.spans)
        last = last or (tokens > self.machine.batcher.max_tokens and len(spans) > 1)
        if last:
            del self.in_flight[instance]
        self.feed(done(batch, results, last))
        if replica.batch is batch:  # the scheduler knows what its rows have done
            assert [known[3:8] for known in replica.spans] == [span[3:8] for span in spans]

    def stepped(self, instance, spans):
        """What a step has read and written, before what it unmasked is counted."""

    def reported(self, spans, results):
        """What a step has done, before the scheduler hears of it."""

    def check_that_all_ended(self):
        """Each request has ended once, and the clients were told what the totals say."""
        assert self.ended == {f"r{i}" for i in range(self.rows)}
        assert not self.alive
        assert not self.machine.requests
        fates = self.machine.totals.fates
        assert (fates["declined"], fates["failed"]) == (self.told[Decline], self.told[Fail])

    def settle(self):
        """Bring up every instance and let everything end."""
        while self.dying:
            self.lose(min(self.dying))
        for rank in {0, 1, 2, 3} - self.up:
            self.toggle(rank)
        while self.in_flight or self.machine.requests or self.forming:
            if self.forming:
                self.form(min(self.forming))
            elif self.in_flight:
                self.finish(min(self.in_flight))
            else:
                self.now = max(self.now, self.machine.wake_at())
                self.perform(self.decide())
