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


class Calls:
    """Calls into a library that has locks of its own, as that of NumPy's matrix products; a fork waits for their end.

    Else the child would find such a lock taken by a thread that it does not have.
    """

    def __init__(self):
        self._renew()
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._renew)

    def _renew(self):
        self._changed = threading.Condition(threading.Lock())
        self._running = 0
        self._forks = 0

    def __enter__(self):
        with self._changed:
            while self._forks:
                self._changed.wait()
            self._running += 1

    def __exit__(self, *error):
        with self._changed:
            self._running -= 1
            if self._forks and not self._running:
                self._changed.notify_all()

    def _hold(self):
        self._changed.acquire()
        self._forks += 1
        while self._running:
            self._changed.wait()

    def _release(self):
        self._forks -= 1
        self._changed.notify_all()
        self._changed.release()


matrix_products = Calls()


class cached:  # noqa: N801
    """functools.cached_property without the lock that it has before Python 3.12; two threads may both compute."""

    def __init__(self, compute):
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, owner, kind=None):
        return self if owner is None else owner.__dict__.setdefault(self._name, self._compute(owner))
