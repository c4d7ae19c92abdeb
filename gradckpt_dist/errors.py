"""The one tree of errors.

Every message says what was given, what is allowed and what to do.
"""

from __future__ import annotations


class GradckptError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(GradckptError):
    """A configuration that cannot be used: unknown key, wrong type, value out of range, unreadable file."""


class BlocksNotFoundError(GradckptError):
    """No block was found in the model, or a given name or glob matches no module."""


class ConflictError(GradckptError):
    """Something else already checkpoints, offloads or compiles the same blocks and cannot be taken over."""


class AgreementError(GradckptError):
    """The ranks of a domain do not agree, or one of them did not answer in time.

    ``rank`` is the first rank at fault (``None`` where none can be named), ``step`` the step of the decision
    (0 at set-up), ``reason`` the cause without the preamble.
    """

    def __init__(self, reason: str, *, rank: int | None = None, step: int = 0) -> None:
        self.rank = rank
        self.step = step
        self.reason = reason
        where = f"rank {rank}, step {step}" if rank is not None else f"step {step}"
        super().__init__(f"agreement failed ({where}): {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_agreement_error, (self.reason, self.rank, self.step)


class MaskError(GradckptError):
    """A mask of the wrong length, with an unknown storage, or with one that the configuration does not allow."""


class StorageError(GradckptError):
    """A storage was asked for something that it cannot do, such as a double backward through a lossy block."""


class BudgetError(GradckptError):
    """No mask fits the memory budget; the message gives the smallest feasible bytes."""


def _rebuild_agreement_error(reason: str, rank: int | None, step: int) -> AgreementError:
    return AgreementError(reason, rank=rank, step=step)
