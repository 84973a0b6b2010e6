"""What the host and its control groups leave, read from directories that look like /proc and /sys/fs/cgroup."""

import multiprocessing
import os
import platform
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.config import DeviceConfig
from dilaserve.errors import ConfigError
from dilaserve.system import host, shared_memory
from dilaserve.system.host import HOST
from dilaserve.transport.devices import threads_for
from dilaserve.worker import memory

GIB = 2**30
V2 = "30 24 0:26 {seen} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = (
    "33 31 0:30 {seen} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {seen} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)
OFF_V1 = 0x7FFFFFFFFFFFF000


def made(root, mounts, member, files, free=64 * GIB, seen="/"):
    """A root directory with these files, on a host with so much memory."""
    files = {
        "proc/meminfo": f"MemTotal:  999999999 kB\nMemAvailable:   {free // 1024} kB\n",
        "proc/self/mountinfo": f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts.format(seen=seen)}\n",
        "proc/self/cgroup": member,
        **files,
    }
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def v2(limit="max", used=0, idle=0, high="max", quota="max 100000"):
    stat = f"anon 5\ninactive_file {idle}\nactive_file 7"
    return {
        "memory.max": limit,
        "memory.high": high,
        "memory.current": used,
        "memory.stat": stat,
        "cpu.max": quota,
    }


def below(directory, files):
    return {f"{directory}/{name}": text for name, text in files.items()}


def test_without_control_groups_the_host_alone_counts(tmp_path):
    assert host.memory_left(made(tmp_path, "", "", {}, free=3 * GIB)) == (3 * GIB, HOST)
    assert host.memory_left(tmp_path / "nothing").bound == HOST
    assert host.cores(tmp_path) == host.affinity() >= 1


def test_the_least_of_a_version_2_group_and_all_its_ancestors_counts(tmp_path):
    top = "sys/fs/cgroup"
    files = {
        **below(f"{top}/pod/box", v2(limit=8 * GIB, used=GIB)),
        **below(f"{top}/pod", v2(limit=4 * GIB, used=3 * GIB, idle=GIB, quota="50000 100000")),
        f"{top}/cpu.stat": "",
    }
    root = made(tmp_path, V2, "0::/pod/box", files)
    assert host.memory_left(root) == (2 * GIB, f"the memory cgroup {root / top}/pod")
    assert host.cores(root) == 1


def test_page_cache_that_is_idle_is_free_and_a_group_over_its_limit_leaves_nothing(tmp_path):
    for i, (state, left) in enumerate(
        [
            (v2(limit=2 * GIB, used=2 * GIB, idle=GIB), GIB),
            (v2(limit=2 * GIB, used=GIB, idle=3 * GIB), 2 * GIB),
            (v2(limit=GIB, used=2 * GIB), 0),
            (v2(limit=8 * GIB, high=2 * GIB, used=GIB), GIB),
            (v2(used=GIB), 64 * GIB),
        ]
    ):
        root = made(tmp_path / str(i), V2, "0::/", below("sys/fs/cgroup", state))
        assert host.memory_left(root).nbytes == left


@pytest.mark.parametrize("seen", ["/", "/docker/abc"])
def test_version_1_has_a_tree_for_each_controller_and_tells_of_limits_above_a_container(tmp_path, seen):
    inside = "docker/abc/" if seen == "/" else ""
    group = f"sys/fs/cgroup/memory/{inside}".rstrip("/")
    files = {
        f"{group}/memory.limit_in_bytes": OFF_V1,
        f"{group}/memory.usage_in_bytes": 2 * GIB,
        f"{group}/memory.stat": f"inactive_file 1\nhierarchical_memory_limit {5 * GIB}\ntotal_inactive_file {GIB}",
        f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_quota_us": "250000",
        f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_period_us": "100000",
    }
    root = made(tmp_path, V1, "11:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/", files, seen=seen)
    assert host.memory_left(root) == (4 * GIB, f"the memory cgroup {root / group}")
    assert host.cores(root) == min(2, host.affinity())


def test_a_limit_on_memory_and_swap_bounds_memory(tmp_path):
    files = {
        "memory.limit_in_bytes": 4 * GIB,
        "memory.usage_in_bytes": GIB,
        "memory.memsw.limit_in_bytes": 4 * GIB,
        "memory.memsw.usage_in_bytes": 3 * GIB,
    }
    root = made(tmp_path, V1, "4:memory:/", below("sys/fs/cgroup/memory", files))
    assert host.memory_left(root).nbytes == GIB


@pytest.mark.parametrize("member", ["0::/../../elsewhere", "0::/gone/long/ago", "0::relative", "nonsense", "0::/"])
def test_a_group_of_another_namespace_is_known_by_what_is_mounted(tmp_path, member):
    root = made(tmp_path, V2, member, below("sys/fs/cgroup", v2(limit=GIB, quota="100000 100000")))
    bounded = member != "nonsense"
    assert host.memory_left(root).nbytes == (GIB if bounded else 64 * GIB)
    assert host.cores(root) == (1 if bounded else host.affinity())


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))), max_size=5))
def test_the_limits_of_all_ancestors_count(tmp_path_factory, levels):
    path, files, expected = "sys/fs/cgroup", {}, [64 * GIB]
    for i, level in enumerate(levels):
        limit, used = level or ("max", 0)
        files |= below(path, v2(limit=limit, used=used))
        expected += [max(0, limit - used)] if level else []
        path = f"{path}/{i}"
    member = "/".join(map(str, range(len(levels) - 1)))
    root = made(tmp_path_factory.mktemp("root"), V2, f"0::/{member}", files)
    assert host.memory_left(root).nbytes == min(expected)


def test_the_cores_that_there_are_are_divided_among_cpu_workers(monkeypatch):
    monkeypatch.setattr(host, "cores", lambda: 5)
    names = ["cpu", "cuda:0", "cpu"]
    assert [threads_for(name, names, DeviceConfig()) for name in names] == [2, 1, 2]
    assert threads_for("cpu", ["cpu"] * 9, DeviceConfig()) == 1
    assert threads_for("cpu", names, DeviceConfig(cpu_threads=7)) == 7


def test_workers_divide_free_memory_once_and_log_their_share(monkeypatch):
    monkeypatch.setattr(host, "memory_left", lambda: host.Memory(20 * GIB, "the memory cgroup /x"))
    claims = [memory.host_claim(workers) for workers in (1, 2, 4)]
    assert [claim.nbytes * workers for claim, workers in zip(claims, (1, 2, 4), strict=True)] == [18 * GIB] * 3
    told = "9.00 GiB for each CPU worker: 2 of them share 90 % of the 20.00 GiB that the memory cgroup /x leaves"
    assert claims[1].origin == told
    assert memory.available(memory.torch.device("cpu"), claims[1]) == pytest.approx(9 * GIB - memory.own(), rel=0.05)
    monkeypatch.setattr(host, "memory_left", lambda: host.Memory(GIB, HOST))  # somebody else has taken the rest
    assert memory.available(memory.torch.device("cpu"), claims[1]) == GIB


def inherits(shared, line):
    shared.tensor[5] = 7
    line.send(int(shared.tensor[4]))


def test_unnamed_shared_memory_is_inherited_by_children():
    shared = shared_memory.SharedBytes(10_000)
    shared.tensor[4] = 9
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=inherits, args=(shared_memory.SharedBytes(10_000, os.dup(shared.fd)), theirs)
    )
    child.start()
    assert ours.recv() == 9
    child.join()
    assert shared.tensor[5] == 7
    assert not shared.tensor[6:].any()


def test_without_unnamed_memory_a_file_is_used_and_without_a_file_one_sentence_is_printed(monkeypatch, tmp_path):
    def refused(name):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refused)
    shared = shared_memory.SharedBytes(4096)
    assert os.fstat(shared.fd).st_size == 4096
    for place in (tmp_path / "missing", "/proc"):  # not there; not to be written to
        monkeypatch.setattr(shared_memory, "FILES", str(place))
        with pytest.raises(ConfigError, match=r"there is no shared memory for the workers: .*; mount a tmpfs at"):
            shared_memory.SharedBytes(4096)


def test_shared_memory_that_is_full_is_told_before_anybody_writes_to_it(monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"no 1 MiB of shared memory .* \(No space left on device\); give /dev/shm"):
        shared_memory.SharedBytes(2**20)
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(host, "memory_left", lambda: host.Memory(GIB, HOST))
    with pytest.raises(ConfigError, match="takes 2048 MiB of shared memory and 1024 are free; lower --max-queue"):
        shared_memory.SharedBytes(2 * GIB)


HEAP = """
import sys
from dilaserve.server import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "kept small":
    heap.keep_small()
first = b"x" * 2**20
del first  # from now on the C library, left alone, has blocks of this size between all others
before, kept, large = resident(), [], []
for count in range(32):
    large.append(bytes([count]) * 2**20)
    kept.append(bytes([count]) * 1000)
large.clear()
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such options")
@pytest.mark.parametrize(
    ("how", "environment", "most"),
    [
        ("kept small", {}, 1),
        ("left alone", {}, None),
        ("kept small", {name: str(2**25) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}, None),
    ],
)
def test_the_heap_of_a_server_keeps_no_large_blocks_unless_the_environment_says_otherwise(how, environment, most):
    command = [sys.executable, "-c", HEAP, how]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= most if most else int(done.stdout) >= 16
