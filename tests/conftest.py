"""What several test files need: checkpoints made once, and a server on one of them."""

import os
import shutil
import sys
from pathlib import Path

import aiohttp
import checkpoints
import pytest
import pytest_asyncio
import torch
from hypothesis import settings

from dilaserve import Config, Engine
from dilaserve.cli import main
from dilaserve.server.app import running
from dilaserve.system import child_processes

CORES = sorted(os.sched_getaffinity(0))
# Files whose workers compute together: on one core each would wait for the others' turns.
TOGETHER = {
    *("test_cuda_engine.py", "test_cuda_steps.py", "test_plan_changes.py", "test_tp_group.py", "test_lost_ranks.py"),
    *("test_fake_cuda.py", "test_process_groups.py", "test_ray_cluster.py"),
}


def share_of_cores() -> list[int]:
    """Those of one of the processes that share the test files. Else a worker, which gives way to everybody, would wait
    for a core on which another's test computes, and the second thread of a step with it.
    """
    number, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    return CORES[int(number.removeprefix("gw")) % len(CORES) :: int(count)]


# Dozens of tests start a Python of their own; without bytecode on the disk each would compile the whole package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Threads of tiny models mostly wait for each other. One that spins meanwhile keeps a core from the one that it waits
# for: beside another busy process, a step of two such threads takes 25 times as long as one of two that sleep.
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of worker processes

settings.register_profile("untimed", deadline=None)  # how fast a machine is says nothing of the code
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def one_fork_server():
    """Dozens of engines have their workers from processes that import torch once, instead of one each."""
    with child_processes.fork_servers.used():
        yield


@pytest.fixture(scope="module", autouse=True)
def cores(request):
    """Of this process, and so of the children that it starts."""
    os.sched_setaffinity(0, CORES if request.path.name in TOGETHER else share_of_cores())


FIXTURES = Path(__file__).parent / "fixtures"
LONGEST = (  # test files by their time, so that of two processes none is left alone with one of them at the end
    *("test_cuda_engine.py", "test_plan_changes.py", "test_engine.py", "test_cuda_steps.py", "test_parity.py"),
    *("test_server_process.py", "test_synchronous_api.py", "test_worker_processes.py", "test_calibrate_command.py"),
    *("test_public_api.py", "test_precision.py"),
)


def pytest_collection_modifyitems(items):
    """The longest files come first; the others keep their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A tiny random checkpoint that never ends by itself."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def author_model(tmp_path_factory) -> Path:
    """The authors' fixture weights, with a tokenizer that fits their ids."""
    directory = tmp_path_factory.mktemp("models") / "author"
    shutil.copytree(FIXTURES / "llada", directory)
    specials = ("<|endoftext|>", *(f"<|extra{i}|>" for i in range(491, 500)), "<|mdm_mask|>")
    checkpoints.write_tokenizer(directory, first_special=490, specials=specials)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    config = Config.of(
        model=str(random_model),
        devices="cpu",
        port=0,
        max_body_bytes=100_000,
        max_choices=4,
        slo_class="slow=1000x,none=none",
    )
    async with Engine(config) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(engine):
    async with running(engine, engine.config) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="module")
async def client(address):
    async with aiohttp.ClientSession(address) as session:
        yield session


@pytest.fixture
def run_main(capsys):
    """Runs a command in this process, which saves its imports; gives its exit code and what it wrote."""

    def run_here(*words):
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run_here
