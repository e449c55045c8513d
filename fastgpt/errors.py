"""Errors a user can cause: one line saying what, where and how to mend it, and an exit code."""


class FastGPTError(Exception):
    """Base of all errors reported as one line; ``exit_code`` becomes the status of the process."""

    exit_code = 1


class UsageError(FastGPTError):
    """A flag, a configuration value or a run directory that cannot be used."""

    exit_code = 2


class DataError(FastGPTError):
    """Unreadable or inconsistent input data; the message names the file and the line or byte."""

    exit_code = 3


class DivergedError(FastGPTError):
    """The loss or the gradient norm stayed non-finite beyond the allowed number of steps."""

    exit_code = 4


class OutOfMemoryError(FastGPTError):
    """The device ran out of memory; the message names the flags that lower the demand."""

    exit_code = 5


class PeerError(FastGPTError):
    """Another process of the run failed and says why; this one ends silently with its code."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


class Preempted(FastGPTError):
    """The run was asked to end early; its state is saved and ``--resume`` goes on with it."""

    exit_code = 75
