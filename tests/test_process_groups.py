"""Process groups of instances that are gone leave nothing behind."""

import os
import threading
import time

import pytest

from dilaserve.transport.collectives_memory import Exchange
from dilaserve.worker.tp_group import Groups, file_of

ROUNDS = 100


class Peers:
    """A process group that knows whether it was ended."""

    def __init__(self):
        self.aborted = False

    def abort(self):
        self.aborted = True


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_process_groups_of_ended_workers_are_aborted_and_forgotten(backend, monkeypatch):
    made = []
    monkeypatch.setattr("dilaserve.worker.tp_group.made", lambda *args: made.append(Peers()) or made[-1])
    exchange = Exchange(3)
    groups = Groups(backend, exchange, 0, "")
    for life in range(1, ROUNDS + 1):
        groups.join(4 * life, (0, 2), (1, 1))
        groups.join(4 * life + 1, (0, 1), (1, life))
        groups.join(4 * life + 2, (0, 1, 2), (1, life, 1))
        assert len(groups.known) == 3
        if life % 2:  # the engine says that a peer is gone
            exchange.abandon(0, 4 * life + 2)
            assert groups.leave(4 * life + 2)
            assert not groups.leave(4 * life + 2)
            assert len(groups.known) == 2
    groups.close()
    assert len(made) == 2 * ROUNDS + 1
    assert backend == "gloo" or all(group.aborted for group in made)
    assert groups.known == {}
    assert threading.active_count() < 20


def test_gloo_leaves_no_connections_threads_or_files_of_ended_workers(tmp_path):
    store, exchange = str(tmp_path / "store"), Exchange(2)
    ranks = [Groups("gloo", exchange, rank, store) for rank in range(2)]

    def counts():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), len(os.listdir(tmp_path))

    def meet(instance, lives):
        threads = [threading.Thread(target=groups.join, args=(instance, (0, 1), lives)) for groups in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def grown(now, before):
        return any(one > other for one, other in zip(now, before, strict=True))

    for life in range(1, 9):
        meet(life, (1, life))
        assert os.path.exists(file_of(store, ((0, 1), (1, life))))
        if life == 2:
            known = counts()
    tries = iter(range(1000))
    while grown(counts(), known) and next(tries, None) is not None:
        time.sleep(0.01)  # a thread that was joined is seen a moment longer
    assert not grown(counts(), known)  # those of other tests may go meanwhile
    for groups in ranks:
        groups.close()
