"""Whole commands as processes of their own, started from a server that has torch loaded already.

Loading torch takes seconds. A command here is a fork of one process that did it once: it has its
own process id, standard output, signals and exit status, like any other. Run as a program this file
is that server; imported, it is the client. Everything that depends on how an interpreter starts
(``--help`` without torch, torchrun, an installed wheel) is tested with real interpreters instead.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    "PYTHONUNBUFFERED": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of processes does not survive a fork
}
SECONDS = 120  # nothing here takes so long; a command that hangs is killed and its test fails

# What the commands load, except the modules that are run themselves.
_PRELOAD = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed",
    "fastgpt.evaluation",
    "fastgpt.plan",
    "fastgpt.report",
    "fastgpt.run",
    "tyro",
)


class Command:
    """A running command. ``out`` is what it has written to standard output and error so far."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self._connection, self._log = connection, log
        self._answers = connection.makefile("r")
        self.pid = int(self._answers.readline())

    @property
    def out(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def handles(self, signum: int) -> bool:
        """Whether the command has a handler of its own for a signal that ends others."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        self._connection.settimeout(SECONDS)
        try:
            status = int(self._answers.readline())
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {SECONDS} s:\n{self.out}") from None
        self._connection.close()
        return status

    def wait_until(self, condition) -> None:
        """Return when ``condition()`` holds; fail when the command ends or takes long before."""
        deadline = time.monotonic() + SECONDS
        self._connection.setblocking(False)
        while not condition():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"a moment that never came in {SECONDS} s:\n{self.out}")
            try:
                ended = self._connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                os.sched_yield()
                continue
            raise AssertionError(f"ended ({ended!r}) before the moment waited for:\n{self.out}")
        self._connection.setblocking(True)


class Server:
    """Starts commands; one for the whole test session."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "server"
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._path)], env=ENVIRONMENT, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the command server did not start; its error is above")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def start(
        self,
        module: str,
        *arguments: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        before: str = "",
    ) -> Command:
        """``python -m module *arguments`` in ``cwd``.

        Args:
            module: full name.
            arguments: of the command line.
            cwd: working directory.
            env: added to the environment.
            limits: RLIMIT_... name -> value.
            before: Python code to run first, in the new process.
        """
        self._count += 1
        log = self._folder / f"{self._count}.log"
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "env": dict(env or {}),
            "limits": dict(limits or {}),
            "before": before,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._path))
        with open(log, "wb") as file:
            socket.send_fds(connection, [json.dumps(request).encode()], [file.fileno()])
        return Command(connection, log)


TINY = (
    *("--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--vocab-size", 300, "--context", 32),
    *("--batch-tokens", 128, "--no-compile", "--dtype", "float32", "--sample-tokens", 8),
    *("--log-every", 1, "--eval-every", 8, "--eval-tokens", 1024, "--seed", 7),
)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str

    @property
    def errors(self) -> list[str]:
        """The lines with which the command said what is wrong."""
        return [line for line in self.out.splitlines() if line.startswith("fastgpt: ")]


@dataclass(frozen=True)
class Shell:
    """Runs commands in one directory."""

    server: Server
    cwd: Path

    def start(self, module: str, *arguments: object, **options) -> Command:
        return self.server.start(f"fastgpt.{module}", *arguments, cwd=self.cwd, **options)

    def run(self, module: str, *arguments: object, **options) -> Done:
        command = self.start(module, *arguments, **options)
        return Done(command.wait(), command.out)

    def pretrain(self, *arguments: object, expect: int = 0, **options) -> Done:
        """A pretraining run of the tiny model on the corpus; fails unless it exits as expected."""
        done = self.run("pretrain", *arguments, **options)
        assert done.status == expect, done.out
        return done

    def ranks(self, size: int, port: int, module: str, *arguments: object) -> list[Command]:
        """Start a command as torchrun does, in ``size`` processes."""
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start(module, *arguments, env={**world, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(size)
        ]


def serve(path: str) -> None:
    """Accept one request a connection; answer the process id and, in the end, the exit status."""
    for name in _PRELOAD:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the monitors
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _monitor(connection)
        connection.close()


def _monitor(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run(json.loads(message), files[0])
    connection.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(request: dict, output: int) -> None:
    import resource

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, resource.RLIM_INFINITY))
    exec(request["before"], {})
    sys.argv = [request["module"], *request["arguments"]]
    status = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def real_python(
    arguments: Sequence[object],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with ``arguments``; output and error together in ``stdout``."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


if __name__ == "__main__":
    serve(sys.argv[1])
