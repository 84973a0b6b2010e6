"""On PYTHONPATH, lets the worker processes that a program starts pretend as their parent does; see pretended.py."""

import os
import sys
from pathlib import Path

if "PRETENDED_GPUS" in os.environ and sys.orig_argv[-1].startswith("dilaserve worker"):
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import pretended

    pretended.install(int(os.environ["PRETENDED_GPUS"]))
