"""Which derivatives of ops are wanted: those by parameters are a third of the work, and often are not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_n_feature_derivatives = 0
_counting = threading.Lock()
_of_thread = threading.local()


@contextmanager
def feature_derivatives() -> Iterator[None]:
    """Leave parameters out of the derivatives taken inside: forces are derivatives by positions alone.

    Autograd asks an op for all its derivatives at once, also for those of parameters that a later derivative
    is by. Parameters get no gradient from a derivative taken inside.
    """
    # For the process and not for the thread: backward passes on a GPU run in a thread of their own. Counted,
    # since threads that are inside at the same time leave in any order.
    global _n_feature_derivatives
    with _counting:
        _n_feature_derivatives += 1
    try:
        yield
    finally:
        with _counting:
            _n_feature_derivatives -= 1


def feature_derivatives_only() -> bool:
    """Tell whether derivatives leave parameters out."""
    return _n_feature_derivatives > 0


@contextmanager
def constant_parameters() -> Iterator[None]:
    """Take parameters for constants in ops that this thread calls inside; nothing is to be derived twice."""
    before = parameters_are_constant()
    _of_thread.constant = True
    try:
        yield
    finally:
        _of_thread.constant = before


def parameters_are_constant() -> bool:
    """Tell whether ops called now take parameters for constants."""
    return getattr(_of_thread, "constant", False)
