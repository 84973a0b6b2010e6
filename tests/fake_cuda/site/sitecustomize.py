"""On PYTHONPATH, gives the process that forks the workers of a program the fake GPUs of their parent; see fake_cuda.

Or the steps that a GPU runs, on the CPU that they have: on fixed buffers, with attention run by run.
"""

import os
import sys

if sys.orig_argv[-1] == "dilaserve fork server":
    if "TORCH_FAKE_GPUS" in os.environ:
        from pathlib import Path

        sys.path.insert(0, str(Path(__file__).parent.parent.parent))
        import fake_cuda

        fake_cuda.install(int(os.environ["TORCH_FAKE_GPUS"]))
    elif "TORCH_STEPS_OF_A_GPU" in os.environ:
        from dilaserve.models import attention

        attention.varlen_for = lambda *where: attention.each_run
