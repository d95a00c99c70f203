"""What Moestro raises. Each message is one line: what was found, what was needed, what to do.

    MoestroError
    ├── ModelError        the model cannot be run: no such id, dense, quantized otherwise, experts out of reach
    ├── CheckpointError   the files are not what their index or config says: truncated, missing a tensor
    ├── BudgetError       it does not fit the memory that was named; carries the numbers
    ├── RequestError      the request cannot be served: prompt longer than the context, a bad option
    ├── CopyError         an expert's weights did not reach the device
    └── ContractError     a policy broke the contract with the conductor (a defect in the policy)

The command line prints the line and exits with status 2; an error of another kind, a defect, is one line and status 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MoestroError(Exception):
    """Base of every error that Moestro raises on purpose."""


class ModelError(MoestroError):
    """The model cannot be run, whatever the memory."""


class CheckpointError(MoestroError):
    """The checkpoint's files are damaged or incomplete."""


class BudgetError(MoestroError):
    """The model does not fit the memory that was named."""


class RequestError(MoestroError):
    """The request cannot be served as it was made."""


class CopyError(MoestroError):
    """An expert's weights did not reach the device; the CPU can compute it where RAM has it."""


class ContractError(MoestroError):
    """A policy returned a decision that cannot be carried out."""


def is_fault(error: BaseException) -> bool:
    """Whether code that was called failed, a panic of a Rust library too; not an interrupt or an exit."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, for one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def in_tensor(name: str) -> Iterator[None]:
    """Put the name of a tensor before what a CheckpointError inside says."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


@contextmanager
def faults_as(kind: type[MoestroError], found: str, remedy: str) -> Iterator[None]:
    """Raise what fails inside, in a tokenizer's code say, as one of our errors: what was found, and what to do."""
    try:
        yield
    except BaseException as error:  # it may be any Python code, or panic
        if not is_fault(error):
            raise
        raise kind(f"{found} ({type(error).__name__}: {first_line(error)}); {remedy}") from error


def refuse_gradients(x: Any) -> None:
    """Refuse a tensor that wants gradients: nothing of ours gives them.

    Raises:
        ModelError: it wants a gradient.
    """
    if x.requires_grad:
        import torch  # here, since help and version do without it

        if torch.is_grad_enabled():
            raise ModelError("Moestro is for inference: it gives no gradients; call the model under torch.no_grad()")
