"""Several processes that train one model, as torchrun starts them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import distributed, nn

__all__ = ["Processes"]


class Processes:
    """This process and its like.

    Attributes:
        rank: Its number.
        world: How many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @staticmethod
    def found() -> Processes:
        """What torchrun has set up; a single process where it has not."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return Processes()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return Processes(distributed.get_rank(), world)

    def wrapped(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are means over all processes."""
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)

    def in_step(self, module: nn.Module, *, is_last: bool) -> Any:
        """Gradients of a step's parts are exchanged once, with the last."""
        return nullcontext() if self.world == 1 or is_last else module.no_sync()

    def close(self) -> None:
        """End the exchange."""
        if self.world > 1 and distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
