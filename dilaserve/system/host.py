"""What the host leaves to this process: memory and cores, as far as control groups (cgroup v1 and v2) allow.

Reads the files of Linux below `root`, and knows nothing of what they are asked for.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")
HOST = "the host"
LIMITS = (  # the files of a control group that bound its memory, and what counts against them
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),  # above it processes are not killed, but slowed down without a bound
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),  # with swap, never less
)
IDLE_CACHE = ("total_inactive_file", "inactive_file")  # v1 with its children, v2; the kernel gives it back when asked
ANCESTORS = "hierarchical_memory_limit"  # of v1: the least limit of all ancestors, also those that cannot be seen


class Memory(NamedTuple):
    """Bytes that may still be taken, and what bounds them: the host, or the directory of a control group."""

    nbytes: int
    bound: str


def memory_left(root: Path = ROOT) -> Memory:
    """The least of what the host has available and what the control groups of this process leave, over all ancestors.

    Page cache that nobody uses counts as free, swap as none.
    """
    found = [Memory(available(root), HOST)]
    for group in groups("memory", root):
        found += [Memory(max(0, left), f"the memory cgroup {group}") for left in memory_of(group)]
    return min(found, key=lambda memory: memory.nbytes)


def cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: by its affinity and by the CPU quotas over it, and at least one.

    Of a quota that is no whole number the rest stays free: threads that wait for one that is throttled gain nothing.
    """
    quotas = [quota for group in groups("cpu", root) for quota in quotas_of(group)]
    return max(1, int(min([affinity(), *quotas])))


def affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def out_of_memory_kills(root: Path = ROOT) -> int:
    """How often the kernel has killed a process of this host for want of memory."""
    return entries(root / "proc/vmstat").get("oom_kill", 0)


def available(root: Path) -> int:
    """Bytes that programs may still take of the host's own memory."""
    kib = entries(root / "proc/meminfo").get("MemAvailable")
    return sys.maxsize if kib is None else 1024 * kib


def memory_of(group: Path) -> Iterator[int]:
    """What each limit of one control group leaves."""
    counts = entries(group / "memory.stat")
    idle = next((counts[name] for name in IDLE_CACHE if name in counts), 0)
    for limit, usage in LIMITS:
        used = number(group / usage)
        if used is None:
            continue
        for most in (number(group / limit), counts.get(ANCESTORS)):
            if most is not None:
                yield most - max(0, used - idle)


def quotas_of(group: Path) -> Iterator[float]:
    """The CPU quota of one control group, in cores."""
    quota, _, period = text(group / "cpu.max").strip().partition(" ")
    pairs = [(quota, period), (text(group / "cpu.cfs_quota_us").strip(), text(group / "cpu.cfs_period_us").strip())]
    for microseconds, every in pairs:
        if microseconds.isdecimal() and every.isdecimal() and int(every):
            yield int(microseconds) / int(every)


def groups(controller: str, root: Path = ROOT) -> list[Path]:
    """The directories of this process's control groups that have the controller, each followed by its ancestors."""
    paths = memberships(root)
    found: list[Path] = []
    for mount in mounts(root):
        path = paths.get(controller if mount.kind == "cgroup" else "")
        if path is not None and (mount.kind == "cgroup2" or controller in mount.controllers):
            found += lineage(root / mount.point.lstrip("/"), mount.root, path)
    return found


def lineage(top: Path, seen: str, path: str) -> list[Path]:
    """The directory of a control group and its ancestors up to `top`, where the part `seen` of the tree is mounted.

    A path outside that part, or one that is not there, is that of another namespace: `top` is all that can be known.
    """
    try:
        inside = PurePosixPath(path).relative_to(seen)
    except ValueError:
        inside = PurePosixPath()
    group = top / inside
    if ".." in inside.parts or not group.is_dir():
        group = top
    return [group, *(parent for parent in group.parents if parent.is_relative_to(top))]


def memberships(root: Path) -> dict[str, str]:
    """The path of this process's control group by controller; that of version 2 has none."""
    lines = [line.split(":", 2) for line in text(root / "proc/self/cgroup").splitlines()]
    return {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}


class Mount(NamedTuple):
    """One mounted tree of control groups: `cgroup` with some controllers, or `cgroup2` with all of them."""

    kind: str
    root: str  # of the part that is mounted
    point: str
    controllers: tuple[str, ...]


def mounts(root: Path) -> Iterator[Mount]:
    for line in text(root / "proc/self/mountinfo").splitlines():
        where, _, what = line.partition(" - ")
        fields, kind = where.split(), what.split()
        if len(fields) > 4 and len(kind) > 2 and kind[0] in ("cgroup", "cgroup2"):
            yield Mount(kind[0], unescaped(fields[3]), unescaped(fields[4]), tuple(kind[2].split(",")))


def unescaped(path: str) -> str:
    """Spaces and the like are octal numbers in the list of mounts."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def entries(file: Path) -> dict[str, int]:
    """A file with one name and number a line, as the kernel writes them."""
    found = re.findall(r"^(\w+):? +(\d+)", text(file), re.MULTILINE)
    return {name: int(value) for name, value in found}


def number(file: Path) -> int | None:
    """None where there is no such file, or it tells of no limit (`max`)."""
    found = text(file).strip()
    return int(found) if found.isdecimal() else None


def text(file: Path) -> str:
    """Nothing where the file is not there or may not be read: a controller that is off bounds nothing."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
