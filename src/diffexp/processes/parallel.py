"""Several processes on one run: each paints its share of the samples, and they learn as one.

Every rank holds the same model and adapter. Samples are dealt out by their index, and noise belongs to the sample, so
that the number of ranks changes no image. Rewards are gathered once an iteration, gradients summed once an update.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from diffexp.errors import Lost, UserError, cut, first_line
from diffexp.processes.heartbeat import Heartbeat
from diffexp.processes.patience import MEETING, patience

MESSAGE = 2**24  # numbers, 128 MB
WORK = timedelta(hours=2)  # from one message to the next: long, because the heartbeat tells a dead rank from a slow one


@dataclass(frozen=True)
class Ranks:
    """This process among all: ``rank`` of ``size``. Alone, every method does nothing."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # where messages are kept: NCCL takes none from the CPU
    heartbeat: Heartbeat | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """Which of ``count`` samples are this rank's."""
        return list(range(self.rank, count, self.size))

    def gather(self, own: Tensor, count: int) -> Tensor:
        """All ``count`` rows, in the samples' order, out of each rank's own (n, …)."""
        order = [sample for rank in range(self.size) for sample in range(rank, count, self.size)]
        joined = self.concatenate(own)
        whole = torch.empty_like(joined)
        whole[order] = joined
        return whole

    def concatenate(self, own: Tensor) -> Tensor:
        """The rows of all ranks, one rank after the other."""
        if self.size == 1:
            return own
        own = own.to(self.device)
        counts = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        counts[self.rank] = len(own)
        self.sum([counts])
        start, total = int(counts[: self.rank].sum()), int(counts.sum())
        whole = own.new_zeros((total, *own.shape[1:]))
        whole[start : start + len(own)] = own
        self.sum([whole])
        return whole

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors, on every rank, by their sums over all ranks, added in float64.

        A LoRA's gradients go in one message, a whole network's in several, so that their copy takes little memory.
        """
        if self.size == 1:
            return
        for parts in messages(tensors):
            flat = torch.cat([part.flatten().double() for part in parts])
            self.send(partial(dist.all_reduce, flat))
            for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def total(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures summed over all ranks."""
        values = [torch.tensor(value, dtype=torch.float64, device=self.device) for value in figures.values()]
        self.sum(values)
        return dict(zip(figures, (value.item() for value in values), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total({"flag": float(flag)})["flag"] > 0

    def greatest(self, number: int) -> int:
        """The greatest of all ranks' numbers."""
        return int(self.concatenate(torch.tensor([[number]], dtype=torch.float64, device=self.device)).max())

    def wait(self) -> None:
        """Returns when every rank is here."""
        if self.size > 1:
            self.send(dist.barrier)

    def send(self, message: Callable[[], object]) -> None:
        """Exchanges a message with all ranks.

        Raises:
            Lost: if one of them is gone; it says which, and what its last error was, as far as that is known.
        """
        try:
            message()
        except RuntimeError as error:
            gone = f"another process of the run is gone, or can't be reached: {first_line(error)}"
            raise Lost(self.heartbeat.reason(gone) if self.heartbeat else gone) from error

    @contextmanager
    def together(self, rescue: Callable[[], None]) -> Iterator[None]:
        """A block that all ranks go through, and leave together. An error on one of them ends it on all.

        ``rescue`` is called before this process ends because of an error, its own or another's; perhaps on a thread.
        Not after a second Ctrl-C, a KeyboardInterrupt that is no ``Interrupted``: who insists waits for no disk.
        """
        if self.heartbeat:
            self.heartbeat.rescue = rescue
        try:
            yield
            self.wait()
        except BaseException as error:
            self.leave(error)
            if type(error) is not KeyboardInterrupt:
                rescue()
            raise
        self.leave()

    def leave(self, error: BaseException | None = None) -> None:
        """Ends the watch over the other ranks, and tells them of an error."""
        if self.heartbeat:
            self.heartbeat.leave(error)


ALONE = Ranks()


def messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of about ``MESSAGE`` numbers, in their order."""
    parts: list[Tensor] = []
    for tensor in tensors:
        parts.append(tensor)
        if sum(part.numel() for part in parts) >= MESSAGE:
            yield parts
            parts = []
    if parts:
        yield parts


def join(device: torch.device) -> Ranks:
    """This process's place, as ``--processes``, torchrun or accelerate tell it in the environment; else alone.

    Raises:
        UserError: if what they should have put there is no number, or the device is one that they can't share.
        Lost: if the others are there, but cannot be talked to.
    """
    for name in ("RANK", "WORLD_SIZE"):
        if not (text := os.environ.get(name, "0")).isdecimal():
            raise UserError(f"{name} = {cut(repr(text))} is no number: unset it, or let torchrun set it")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device = '{device}': only one process can use it; start one, or set device = 'cpu'")
    seconds = patience()
    if dist.is_initialized():
        rank, size, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
        return Ranks(rank, size, str(device), Heartbeat(store, rank, size, seconds))
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING)))
    heartbeat = Heartbeat(store, rank, size, seconds)  # first: the ranks wait for each other from here on
    gpu = device if device.type == "cuda" else None
    if gpu:
        refuse_shared(gpu, store, rank, size)
    try:
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WORK, device_id=gpu)
    except RuntimeError as error:
        raise Lost(heartbeat.reason(f"the processes cannot connect: {first_line(error)}")) from error
    return Ranks(rank, size, str(device), heartbeat)


def refuse_shared(gpu: torch.device, store: dist.Store, rank: int, size: int) -> None:
    """Refuses two processes on one GPU: NCCL would only say that it is lost. All ranks call it together.

    Raises:
        UserError: how many GPUs they have.
    """
    store.set(f"gpu/{rank}", f"{socket.gethostname()} {torch.cuda.get_device_properties(gpu).uuid}")
    gpus = {store.get(f"gpu/{other}") for other in range(size)}
    if len(gpus) < size:
        raise UserError(
            f"device = '{gpu}': {size} processes have {len(gpus)} GPU{'s' * (len(gpus) > 1)} between them, and each "
            "needs its own: start as many as there are GPUs, with device = 'cuda'"
        )
