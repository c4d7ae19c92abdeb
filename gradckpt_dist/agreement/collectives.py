"""The collective step after which every rank of a domain holds the same mask.

At boundary s the statistics are launched, at s + 1 collected and the decision announced, at s + 2 received and
applied: each wait comes a step after its start, so that it hides behind compute.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, _get_default_group, _get_default_store

from gradckpt_dist.agreement.domain import Domain, global_ranks
from gradckpt_dist.agreement.roll_call import Facts, RollCall
from gradckpt_dist.agreement.wire import Decision, decode, encode, message_bytes
from gradckpt_dist.errors import AgreementError, MaskError

_T = TypeVar("_T")

_domains_opened: Counter[tuple[int, ...]] = Counter()
_spare_groups: weakref.WeakKeyDictionary[ProcessGroup, dict[tuple[tuple[int, ...], float], list[ProcessGroup]]] = (
    weakref.WeakKeyDictionary()
)


class Agreement(ABC):
    """One domain's ranks. ``rank`` and ``ranks`` count within it, ``global_rank`` within the job; rank 0 decides."""

    rank: int
    ranks: int
    global_rank: int

    @abstractmethod
    def compare(self, facts: Facts, step: int = 0) -> None:
        """Return once every rank has given equal facts; all ranks call it.

        Raises:
            AgreementError: naming the first rank and field that differ, or who did not come in time.
        """

    @abstractmethod
    def launch(self, sums: torch.Tensor, maxima: Sequence[float], step: int, epoch: int) -> None:
        """Start the two all-reduces. ``sums`` is float64 [n] on any device, ``maxima`` n' host numbers."""

    @abstractmethod
    def collect(self) -> tuple[list[float], list[float]]:
        """Wait for both: sums and maxima over ranks, the same on all of them.

        Raises:
            AgreementError: a rank is dead, late by more than the timeout, or at another step or epoch.
        """

    @abstractmethod
    def add_up(self, sums: torch.Tensor, maxima: Sequence[float], step: int) -> tuple[list[float], list[float]] | None:
        """What ``launch`` and ``collect`` would give, now; None if not all ranks call it at this step, in seconds."""

    @abstractmethod
    def announce(self, decision: Decision | None, blocks: int, step: int) -> None:
        """Start the broadcast of what was launched at ``step``; rank 0 gives its decision, the others None."""

    @abstractmethod
    def receive(self, blocks: Sequence[str], epoch: int) -> Decision:
        """Wait for the decision that takes this domain from ``epoch`` to the next.

        Raises:
            AgreementError: as ``collect``, or what arrived fails its digest or has another epoch.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the process group back: its next use is by another engine of the same ranks."""


class _HostCopy:
    """A tensor on its way to the host: reading it waits for what was queued before, and not for what has been since."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._event = tensor, None
        if not tensor.is_cpu:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            stream = torch.get_device_module(tensor.device).current_stream(tensor.device)
            self._event = stream.record_event()

    def tolist(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._tensor.tolist()
        return values


class LocalAgreement(Agreement):
    """A process on its own agrees with itself, at the same boundaries as a group would."""

    rank = 0
    ranks = 1

    def __init__(self) -> None:
        self.global_rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def compare(self, facts: Facts, step: int = 0) -> None:
        return

    def launch(self, sums: torch.Tensor, maxima: Sequence[float], step: int, epoch: int) -> None:
        self._launched = _HostCopy(sums), list(maxima)

    def collect(self) -> tuple[list[float], list[float]]:
        sums, maxima = self._launched
        return sums.tolist(), maxima

    def add_up(self, sums: torch.Tensor, maxima: Sequence[float], step: int) -> tuple[list[float], list[float]] | None:
        return sums.tolist(), list(maxima)

    def announce(self, decision: Decision | None, blocks: int, step: int) -> None:
        self._decision = decision

    def receive(self, blocks: Sequence[str], epoch: int) -> Decision:
        if self._decision is None:
            raise AgreementError("rank 0 announced no decision", rank=0)
        return self._decision

    def close(self) -> None:
        return


class GroupAgreement(Agreement):
    """These global ranks, on a process group of their own. Gloo and NCCL by the same code."""

    def __init__(self, ranks: Sequence[int], device: torch.device, timeout_seconds: float) -> None:
        self._global_ranks = list(ranks)
        self.global_rank = dist.get_rank()
        self.rank = self._global_ranks.index(self.global_rank)
        self.ranks = len(self._global_ranks)
        self._device = device
        self._timeout_seconds = timeout_seconds
        domain = tuple(self._global_ranks)
        digest = hashlib.sha256(repr(domain).encode()).hexdigest()[:16]
        prefix = f"gradckpt/{digest}/{_domains_opened[domain]}"
        _domains_opened[domain] += 1
        store = PrefixStore(prefix, _get_default_store())
        self._roll_call = RollCall(store, self.global_rank, self._global_ranks, timeout_seconds)
        self._group: ProcessGroup | None = None
        self._sound = True
        self._stream = None if device.type == "cpu" else torch.get_device_module(device).Stream(device)
        self._step = 0

    def compare(self, facts: Facts, step: int = 0) -> None:
        self._roll_call.compare(facts, step)

    def launch(self, sums: torch.Tensor, maxima: Sequence[float], step: int, epoch: int) -> None:
        self._step, self._epoch = step, epoch
        most = self._vector([step, -step, epoch, -epoch, *maxima])
        self._reductions = self._guard(lambda: self._start_reductions(sums, most))

    def collect(self) -> tuple[list[float], list[float]]:
        (sums, sums_work), (most, most_work) = self._reductions
        total = self._guard(lambda: self._finish(sums, sums_work)).tolist()
        last_step, first_step, last_epoch, first_epoch, *maxima = self._guard(
            lambda: self._finish(most, most_work)
        ).tolist()
        if last_step != -first_step or last_epoch != -first_epoch:
            here = {"step": self._step, "epoch": self._epoch}
            self._roll_call.compare(here, self._step)
        return total, maxima

    def add_up(self, sums: torch.Tensor, maxima: Sequence[float], step: int) -> tuple[list[float], list[float]] | None:
        if not self._guard(lambda: self._roll_call.all_here(step)):
            return None
        most = self._vector(maxima)
        started = self._guard(lambda: self._start_reductions(sums, most))
        total, largest = self._guard(lambda: [self._finish(*pair).tolist() for pair in started])
        return total, largest

    def announce(self, decision: Decision | None, blocks: int, step: int) -> None:
        self._step = step

        def start() -> None:
            self._message = self._new_message(decision, blocks)
            self._message_work = dist.broadcast(
                self._message, src=self._global_ranks[0], group=self._own_group(), async_op=True
            )

        self._guard(start)

    def receive(self, blocks: Sequence[str], epoch: int) -> Decision:
        message = self._guard(lambda: self._finish(self._message, self._message_work))
        try:
            decision = decode(message, blocks)
        except MaskError as error:
            raise self._own_fault(str(error)) from error
        if decision.mask.epoch != epoch + 1 or decision.step != self._step:
            raise self._own_fault(
                f"received epoch {decision.mask.epoch} of step {decision.step}, expected epoch {epoch + 1} "
                f"of step {self._step}"
            )
        return decision

    def close(self) -> None:
        group, self._group = self._group, None
        if not dist.is_initialized():
            return
        self._roll_call.leave(failed=False)
        if group is not None and self._sound:
            self._spare_groups().append(group)
        elif group is not None:
            dist.destroy_process_group(group)

    def _own_group(self) -> ProcessGroup:
        if self._group is None and (spare := self._spare_groups()):
            self._group = spare.pop()
        if self._group is None:
            self._group = dist.new_group(
                self._global_ranks,
                timeout=timedelta(seconds=self._timeout_seconds),
                use_local_synchronization=True,
                group_desc="gradckpt",
            )
        return self._group

    def _spare_groups(self) -> list[ProcessGroup]:
        """Groups of these ranks that earlier engines gave back.

        They are used again, since torch names a group by its ranks and the number of groups: a new one would find under
        its name in the store the addresses of one that was destroyed, and try to connect to them.
        """
        spare = _spare_groups.setdefault(_get_default_group(), {})
        return spare.setdefault((tuple(self._global_ranks), self._timeout_seconds), [])

    def _start_reductions(self, sums: torch.Tensor, most: torch.Tensor) -> tuple[tuple[torch.Tensor, dist.Work], ...]:
        group = self._own_group()
        return tuple(
            (tensor, dist.all_reduce(tensor, op=op, group=group, async_op=True))
            for tensor, op in ((sums, dist.ReduceOp.SUM), (most, dist.ReduceOp.MAX))
        )

    def _vector(self, values: Sequence[float]) -> torch.Tensor:
        """Float64 on the device. An array is read without looking at each number's type twice, as torch.tensor does."""
        return self._on_device(torch.frombuffer(array("d", values), dtype=torch.float64))

    def _new_message(self, decision: Decision | None, blocks: int) -> torch.Tensor:
        if decision is None:
            return torch.empty(message_bytes(blocks), dtype=torch.uint8, device=self._device)
        return self._on_device(encode(decision))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._stream is None else tensor.to(self._device, non_blocking=True)

    def _finish(self, tensor: torch.Tensor, work: dist.Work) -> torch.Tensor:
        if self._stream is None:
            work.wait()
            return tensor
        # On a stream of its own, so that the host waits for this collective and not for the compute queued since.
        with torch.get_device_module(self._device).stream(self._stream):
            work.wait()
            return tensor.cpu()

    def _guard(self, call: Callable[[], _T]) -> _T:
        """Turn a collective's failure into an error that names who is missing."""
        try:
            return call()
        except RuntimeError as error:
            self._sound = False
            raise self._blame(error) from error

    def _own_fault(self, reason: str) -> AgreementError:
        """Something is wrong here; the others, whom this rank leaves alone, are told so."""
        self._roll_call.leave(failed=True)
        return AgreementError(reason, rank=self.global_rank, step=self._step)

    def _blame(self, error: RuntimeError) -> AgreementError:
        cause = str(error).splitlines()[0]
        try:
            alive = self._roll_call.survivors()
            missing = [rank for rank in self._global_ranks if rank not in alive]
            if missing:
                faulty, deed = self._roll_call.blame(missing)
                return AgreementError(f"ranks {faulty} {deed}: {cause}", rank=faulty[0], step=self._step)
            last = self._roll_call.last_survivor()
        except RuntimeError as store_error:
            return AgreementError(
                f"a collective failed ({cause}), and so did the store ({str(store_error).splitlines()[0]}); "
                "the rank that hosts it is probably dead",
                step=self._step,
            )
        reason = f"a collective failed on all ranks, last on rank {last}, which was probably late for it: {cause}"
        return AgreementError(reason, rank=last, step=self._step)


def create_agreement(domain: Domain | None, device: torch.device, timeout_seconds: float) -> Agreement:
    """For the given ranks, all ranks, or a process on its own.

    Raises:
        AgreementError: this rank is not in the domain.
    """
    if not dist.is_available() or not dist.is_initialized():
        return LocalAgreement()
    ranks = global_ranks(domain)
    return LocalAgreement() if len(ranks) == 1 else GroupAgreement(ranks, device, timeout_seconds)
