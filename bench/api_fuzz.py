"""Send what schemathesis makes of /openapi.json to a server of its own, and check every answer against the document.

    python bench/api_fuzz.py [--cases 10000] [--seed 0] [--schemathesis st]

schemathesis is not among the packages of the tests; install it where you like (`pip install schemathesis`, 4 or newer)
and name its command. Exit code 1 if an answer is wrong (a 5xx; a status, content type or body that the document does
not know; a key that is not asked for), or if the server has not ended well.
"""

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path

import soaking
from soaking.processes import Server, serving

KEY = "secret"
FLAGS = ["--devices", "cpu", "--default-max-tokens", "8", "--max-queue", "64"]
LEFT_OUT = (  # checks that do not hold for this server
    "positive_data_acceptance",  # limits that depend on the model, or on two fields, stand in no schema
    "negative_data_rejection",  # unknown fields and headers are ignored, as next month's clients send some
    "unsupported_method",  # PATCH and others are refused by aiohttp, also where the document has a path's other method
)
ENDPOINTS = 9  # with bodies, to which almost all cases go
WORKERS = 4  # that send at a time
HOOKS = Path(soaking.__file__).with_name("schemathesis_hooks.py")


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemathesis", default="st", help="the command, or where it is")
    args = parser.parse_args()
    if not (command := shutil.which(args.schemathesis)):
        print(f"there is no {args.schemathesis}; install schemathesis, or give its path", file=sys.stderr)
        return 2
    ends: list[str] = []
    async with serving([*FLAGS, "--api-key", KEY, "--admin-key", KEY], ends) as server:
        code = await fuzz(server, command, args.cases, args.seed)
        ends += server.tracebacks()
    for wrong in ends:
        print(f"the server: {wrong}")
    return int(bool(code or ends))


async def fuzz(server: Server, command: str, cases: int, seed: int) -> int:
    """The exit code of schemathesis."""
    words = [
        *("run", f"http://{server.host}:{server.port}/openapi.json", "--phases", "coverage,fuzzing", "--no-shrink"),
        *("--max-examples", str(max(1, cases // ENDPOINTS)), "--seed", str(seed), "--workers", str(WORKERS)),
        *("--header", f"Authorization: Bearer {KEY}", "--exclude-checks", ",".join(LEFT_OUT)),
        *("--request-timeout", "60", "--continue-on-failure"),
    ]
    hooks = {"PYTHONPATH": str(HOOKS.parent), "SCHEMATHESIS_HOOKS": HOOKS.stem}
    process = await asyncio.create_subprocess_exec(command, *words, env=os.environ | hooks)
    return await process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
