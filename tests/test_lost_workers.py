"""What a lost, hung or paused worker costs the requests on it."""

from scheduler_builders import done, feed, formed, of, request, result, rows_of, scheduler, up

from dilaserve.types import (
    Arrival,
    Cancel,
    Fail,
    Instance,
    InstanceLost,
    InstanceReady,
    Launch,
    Plan,
    Release,
    Reshard,
    WorkerLost,
    WorkerUp,
)


def test_a_lost_worker_costs_a_refresh_and_nothing_else():
    machine = scheduler()
    for i in range(2):
        feed(machine, InstanceReady(Instance(i, (i,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    _, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], masks_left=8, prefix=30)]))
    (again,) = feed(machine, InstanceLost(launch.batch.instance, "killed"))
    (span,) = again.batch.spans
    assert again.batch.instance != launch.batch.instance
    assert (span.start, span.length, span.block_start) == (0, 74, 10)
    assert feed(machine, done(launch.batch, [result(span)])) == []  # the late report of the lost one


def test_a_row_in_flight_at_two_crashes_fails_alone():
    machine = scheduler(max_num_seqs=1)
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    feed(machine, Arrival(request(0)))
    feed(machine, Arrival(request(1, at=1.0)))
    feed(machine, InstanceLost(0, "killed"))
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    fail, release = feed(machine, InstanceLost(0, "killed"))
    assert isinstance(fail, Fail)
    assert (fail.request.row, release) == (0, Release(0))
    (launch,) = feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    assert [span.row for span in launch.batch.spans] == [1]


def test_a_row_survives_any_number_of_workers_killed_from_outside():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    for i in range(3):
        feed(machine, Arrival(request(i, at=float(i))))
    for life in range(1, 6):
        assert feed(machine, InstanceLost(life - 1, "killed by SIGKILL", outside=True)) == []
        (launch,) = feed(machine, InstanceReady(Instance(life, (0,), 4096)))
        assert {span.row for span in launch.batch.spans} == {0, 1, 2}  # none is taken alone


def test_other_rows_survive_a_row_that_kills_workers():
    machine = scheduler()
    feed(machine, InstanceReady(Instance(0, (0,), 4096)))
    (launch,) = feed(machine, Arrival(request(0)))
    for i in (1, 2):
        feed(machine, Arrival(request(i, at=float(i))))
    *_, launch = feed(machine, done(launch.batch, [result(launch.batch.spans[0], 20, 12)]))
    assert {span.row for span in launch.batch.spans} == {0, 1, 2}
    feed(machine, InstanceLost(0, "killed"))
    (launch,) = feed(machine, InstanceReady(Instance(1, (1,), 4096)))
    assert [span.row for span in launch.batch.spans] == [0]  # each suspect alone
    fail, _ = feed(machine, InstanceLost(1, "killed"))
    assert fail.request.row == 0
    (launch,) = feed(machine, InstanceReady(Instance(2, (0,), 4096)))
    seen = [{span.row for span in launch.batch.spans}]
    for _ in range(2):
        *_, launch = feed(machine, done(launch.batch, [result(span, 20, 12) for span in launch.batch.spans]))
        seen.append({span.row for span in launch.batch.spans})
    assert seen == [{1}, {2}, {1, 2}]


def test_a_row_that_fits_on_no_instance_blocks_no_other_and_fails_when_all_workers_are_back():
    machine = scheduler(plan=Plan(((0,), (1,))), best_effort_age=5.0)
    up(machine, range(2))
    feed(machine, Arrival(request(0, answer=2048)))
    for replica in sorted(machine.placement.replicas.values(), key=lambda replica: len(replica.residents)):
        (rank,) = replica.instance.ranks
        list(machine.observe(WorkerLost(rank, "killed"), 1.0))
        feed(machine, InstanceLost(replica.instance.id, "killed"), 1.0)
    formed(machine, feed(machine, WorkerUp(0, 1024), 2.0), 2.0)
    (launch,) = feed(machine, Arrival(request(1, at=3.0)), 3.0)
    assert [span.row for span in launch.batch.spans] == [1]
    (launch,) = feed(machine, done(launch.batch, [result(span, 9, 20) for span in launch.batch.spans]), 9.0)[1:]
    assert "r0" in machine.requests  # the other may come back with what it had
    commands = formed(machine, feed(machine, WorkerUp(1, 512), 10.0), 10.0)
    (fail,) = [command for command in commands if isinstance(command, Fail)]
    assert fail.request.row == 0
    assert "lower max_tokens" in fail.for_client
    assert Release(0) in commands


def test_a_lost_instance_keeps_its_rows_and_gets_no_work_until_all_its_ranks_have_left():
    """Also when the rank that died is back before the other has left."""
    machine = scheduler(plan=Plan(((0, 1),)))
    up(machine, range(2))
    (launch,) = feed(machine, Arrival(request(0)))
    feed(machine, Cancel("r0", "cancelled"))
    assert of(feed(machine, WorkerLost(0, "killed"), 1.0), Release) == []
    assert feed(machine, WorkerUp(0, 4096), 2.0) == []
    assert feed(machine, Arrival(request(1, at=3.0)), 3.0) == []
    commands = feed(machine, InstanceLost(launch.batch.instance, "killed", outside=True), 4.0)
    assert Release(0) in commands
    (reshard,) = of(commands, Reshard)
    assert reshard.moves.begins[0].ranks == (0, 1)
    assert rows_of(feed(machine, InstanceReady(reshard.moves.begins[0]), 4.0)) == {1}


def test_an_idle_instance_that_lost_a_rank_gets_no_work_although_the_rank_is_back():
    machine = scheduler(plan=Plan(((0, 1),)))
    up(machine, range(2))
    (old,) = machine.placement.replicas
    for event in (WorkerLost(0, "killed"), WorkerUp(0, 4096)):  # both are seen at once
        list(machine.observe(event, 1.0))
    commands = feed(machine, Arrival(request(0, at=1.0)), 1.0)
    assert of(commands, Launch) == []
    (reshard,) = of(commands, Reshard)
    assert reshard.moves.ends == (old,)
