"""Who is still there: every process counts up a number of its own where all can read it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

BEAT = 0.5
"""Seconds between two beats."""
SILENT = 5 * BEAT
"""A process that counts no further for so long, when a collective has failed, is the one that is gone."""


class Pulse:
    """This process's sign of life, and what it knows of the others'.

    While it is open, a thread beats and listens. Where a collective never returns, as NCCL's may not when a peer is
    gone, that thread says who is missing and ends the process, `timeout` seconds after the last sign of life.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        # a connection of its own: what the main thread waits for must not hold up a beat
        self.store = PrefixStore("gossamer", store.clone())  # pyright: ignore[reportAttributeAccessIssue]
        self.store.set_timeout(timedelta(seconds=SILENT))
        self._seen: dict[int, tuple[int, float]] = {}
        """The last new beat of each other process, and when it was heard."""
        self._listened = time.monotonic()
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def leave(self, reason: str) -> None:
        """Say why this process ends, for the others to repeat."""
        with contextlib.suppress(RuntimeError):  # whoever keeps the store is gone, and the others see that
            self.store.set(f"left/{self.rank}", reason)
            if self.rank == 0:  # it may keep the store, which the others are about to ask
                time.sleep(SILENT)

    def reason(self) -> str | None:
        """Why the others cannot go on: the first of them that is gone or said why it left; None if all are there."""
        try:
            before = self._beats()
            time.sleep(SILENT)
            after = self._beats()
            left = [r for r in before if self.store.check([f"left/{r}"])]
            if left:
                return self.store.get(f"left/{left[0]}").decode()
        except RuntimeError:
            silent = [r for r, (_, last) in self._seen.items() if self._listened - last > SILENT]
            gone = (
                f"process {silent[0]} of {self.size}" if silent else f"process 0 of {self.size}, which keeps the store,"
            )
            return f"{gone} is gone"
        silent = [r for r in before if before[r] == after[r]]
        return f"process {silent[0]} of {self.size} is gone" if silent else None

    def _beats(self) -> dict[int, int]:
        """The number at which each other process is."""
        return {r: self.store.add(f"beat/{r}", 0) for r in range(self.size) if r != self.rank}

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            now = time.monotonic()
            try:
                self.store.add(f"beat/{self.rank}", 1)
                for r, beat in self._beats().items():
                    if r not in self._seen or self._seen[r][0] != beat:
                        self._seen[r] = beat, now
                self._listened = now
            except RuntimeError:
                return  # no store, no news: the main thread meets it, too
            for r, (_, last) in self._seen.items():
                if now - last > self.timeout + SILENT and not self._stop.is_set():
                    print(
                        f"gossamer: process {r} of {self.size} is gone; silent for {self.timeout:g} s", file=sys.stderr
                    )
                    sys.stderr.flush()
                    os._exit(2)
