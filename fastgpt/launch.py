"""How a stage that starts from a run becomes a command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fastgpt import cli
from fastgpt.config import StageConfig

if TYPE_CHECKING:
    from fastgpt.distributed import World

C = TypeVar("C", bound=StageConfig)


def launch(kind: type[C], stage: Callable[[C, World], None], argv: Sequence[str] | None) -> None:
    """Run ``stage`` with the configuration of ``argv`` in this process, one of those of a run.

    PyTorch is loaded behind the command line: ``--help`` and most mistakes need none.
    """
    config = cli.parse(kind, argv)
    config.check()
    from fastgpt.distributed import world
    from fastgpt.memory import keep_freed_memory

    keep_freed_memory()
    with world(config.train.device) as processes:
        stage(config, processes)
