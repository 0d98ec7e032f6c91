"""Whole matrices, each worked on by one process: the next one travels while this one is worked on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gossamer.distributed.shards import Part, ShardedRows, collect, deliver
from gossamer.rows import Parts, answered


class Job(NamedTuple):
    """A function of a whole matrix, asked for by `parts`."""

    parts: Parts
    rows: ShardedRows
    cost: int
    """Of the function, in any unit."""
    done: Callable[[Tensor], None]
    """Takes what `parts` returns."""


def run(jobs: Iterable[Job]) -> None:
    """Do all jobs; every process calls this with the same ones in the same order."""
    alike: defaultdict[tuple[DeviceMesh, int], list[Job]] = defaultdict(list)
    for job in jobs:
        alike[job.rows.mesh, job.rows.axis].append(job)
    for (mesh, axis), some in alike.items():
        _run(assigned(some, mesh.size(axis)))


def assigned(jobs: Sequence[Job], processes: int) -> list[list[Job | None]]:
    """Waves of one job for each process, the dearest first, each to the process with the least to do."""
    queues: list[list[Job]] = [[] for _ in range(processes)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        min(queues, key=lambda queue: sum(other.cost for other in queue)).append(job)
    longest = max(map(len, queues))
    return [[queue[i] if i < len(queue) else None for queue in queues] for i in range(longest)]


def _run(waves: Sequence[Sequence[Job | None]]) -> None:
    ahead, landing = _Wave(waves[0]), None
    for following in (*waves[1:], None):
        wave = ahead
        if following is not None:
            ahead = _Wave(following)  # it travels while we work
        wave.work()
        if landing is not None:  # it travelled back while we worked
            landing.finish()
        landing = wave
    assert landing is not None
    landing.finish()


class _Wave:
    """Jobs that travel together, one for each process at most."""

    def __init__(self, jobs: Sequence[Job | None]) -> None:
        """Run each up to its question, and send the rows of the matrix it is about."""
        self.jobs = jobs
        self.asked = [None if job is None else next(job.parts) for job in jobs]
        self.parts = [
            None if job is None or asked is None else Part(job.rows, asked[1])
            for job, asked in zip(jobs, self.asked, strict=True)
        ]
        self.matrix = collect(self.parts)

    def work(self) -> None:
        """Answer the question that is mine, and send the rows back."""
        place = next(job.rows.place for job in self.jobs if job is not None)
        matrix, asked = self.matrix(), self.asked[place]
        result = None if matrix is None or asked is None else asked[0](matrix)
        self.rows = deliver(self.parts, result)

    def finish(self) -> None:
        for job, rows in zip(self.jobs, self.rows(), strict=True):
            if job is not None and rows is not None:
                job.done(answered(job.parts, rows))
