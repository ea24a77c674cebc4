"""Locks of threads that a forked child does not have would never be released in it: how to do without them."""

import os
import threading


class Turn:
    """A lock of each process: what a thread of the parent's held when the child was forked, the child finds free."""

    def __init__(self):
        self._locks = {}

    def of_this_process(self):
        """The lock, for `with`."""
        return self._locks.setdefault(os.getpid(), threading.Lock())  # in one step


class cached:  # noqa: N801
    """functools.cached_property without the lock that it has before Python 3.12; two threads may both compute."""

    def __init__(self, compute):
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, owner, kind=None):
        return self if owner is None else owner.__dict__.setdefault(self._name, self._compute(owner))
