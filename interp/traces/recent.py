"""Arrays that were read last, kept within bounds."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np


class Recent:
    """The arrays used last, up to a number of bytes; safe to use from several threads.

    Args:
        most: bytes in all; a larger array is made each time it is asked for.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a key; made if it is not held. It must not be written to."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        made = make()  # not under the lock: others may read meanwhile
        made.setflags(write=False)
        with self._lock:
            if key not in self._arrays and made.nbytes <= self.most:
                self._arrays[key] = made
                self.held += made.nbytes
            while self.held > self.most:
                self.held -= self._arrays.popitem(last=False)[1].nbytes
        return made
