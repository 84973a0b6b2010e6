"""Runs a module as `python -m` does, on fake GPUs: `python tests/fake_cuda 2 -m dilaserve`."""

import os
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # so that this folder is the package fake_cuda
from fake_cuda import fake_gpus, for_workers  # noqa: E402


def main():
    """Run a module as `python -m` does, on so many GPUs."""
    count, flag, module, *rest = sys.argv[1:]
    assert flag == "-m", __doc__
    os.environ |= for_workers(int(count))
    sys.path.insert(0, os.getcwd())
    sys.argv = [module, *rest]
    with fake_gpus(int(count)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
