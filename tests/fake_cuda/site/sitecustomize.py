"""On PYTHONPATH, gives the worker processes that a program starts the fake GPUs of their parent; see fake_cuda."""

import os
import sys
from pathlib import Path

if "FAKE_GPUS" in os.environ and sys.orig_argv[-1].startswith("dilaserve worker"):
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    import fake_cuda

    fake_cuda.install(int(os.environ["FAKE_GPUS"]))
