"""The worker process: imports torch and fastlora once, then forks a child for every job.

A job is a line of JSON on stdin: {"function": "module:name", "arguments": {...}, "output": path}.
Two lines answer on stdout: {"pid": ...} at once and {"exit": ...} when the child has ended. The
child's own output goes to `output`. Nothing runs in the server itself: with one thread for torch,
no thread pool starts before a fork, so that forking is safe on the CPU.
"""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

_ADDRESS_SPACE = 6 * 2**30  # bytes that a child may map beyond what the server has: no test needs 1


def _run(job: dict[str, Any]) -> NoReturn:
    """In the child: run the job's function and leave without the server's clean-up."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A shell's background jobs ignore SIGINT, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        module, name = job["function"].split(":")
        getattr(importlib.import_module(module), name)(**job["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        traceback.print_exc()
    except KeyboardInterrupt:  # as the interpreter reports it to a shell
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001  a child must never run the server's loop
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    sys.path[0] = str(Path(__file__).parents[1])  # "faults" is imported from tests/
    import torch

    torch.set_num_threads(1)
    modules = ("faults.cases", "faults.kills", "bitsandbytes", "jinja2", "tqdm")
    for module in (*modules, "torch.func", "torch._dynamo"):
        importlib.import_module(module)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a line that a library prints must not look like a reply
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(json.dumps({"pid": pid}), file=replies, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}), file=replies, flush=True)


if __name__ == "__main__":
    main()
