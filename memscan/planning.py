"""This module estimates time, GPU-hours, storage and cost of a census before it is paid for.

`estimate` has the closed form: work divided by workers, plus start-up and the wait for the last block. `simulate` plays
the same pipeline event by event, with workers that are lost and come back, for what no closed form covers: a sampler's
pool and a judges' pool with a bounded queue between them, blocks done again after a loss, spot machines that stay away
for a while. Both take the rates of the stages as measured; neither knows how fast a GPU is.

Times are in seconds, rates in prompts per second and worker, and storage in bytes.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memscan.errors import ConfigError

# Blocks that may wait between two stages, for each worker of the second: as many as an actor is given ahead.
QUEUE_PER_WORKER = 2
HOUR = 3600.0
# Blocks that are simulated one by one; larger jobs are dealt out in runs of blocks, ever shorter towards the end.
SINGLE_BLOCKS = 10_000
RUNS_PER_WORKER = 20
# Losses that are simulated; a job with more is simulated in part, its steady state being all that matters.
MOST_LOSSES = 20_000
# A worker that lives for a fifth of a block finishes one in a hundred and fifty: the plan would never end.
LONGEST_BLOCK = 5.0


@dataclass(frozen=True)
class Stage:
    """A stage is one pool of workers.

    Args:
        name: for the report.
        rate: prompts per second that one worker does, when it works.
        gpus: of one worker.
        cpus: of one worker.
    """

    name: str
    rate: float
    gpus: float = 0.0
    cpus: float = 1.0


@dataclass(frozen=True)
class Job:
    """A job is what is planned.

    Args:
        prompts: to be scanned.
        block: prompts of one task, the unit that is done again when a worker is lost.
        stages: one or two pools, in the order in which a block meets them.
        startup: from a worker's start to its first block.
        bytes_per_prompt: of the census files.
        writes: prompts per second that the writer and the driver take in at most; infinite where not known.
    """

    prompts: int
    block: int
    stages: tuple[Stage, ...]
    startup: float
    bytes_per_prompt: float
    writes: float = math.inf

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.block < 1 or not 1 <= len(self.stages) <= 2:
            raise ConfigError("a plan needs at least one prompt, a block of at least one prompt, and one or two stages")
        for stage in self.stages:
            if not (stage.rate > 0 and math.isfinite(stage.rate)):
                raise ConfigError(f"the rate of {stage.name} is {stage.rate}, not a number above 0")

    @property
    def blocks(self) -> int:
        return math.ceil(self.prompts / self.block)


@dataclass(frozen=True)
class Failures:
    """This says how workers are lost.

    Args:
        hours: mean time between two losses of one worker (exponential); infinite for none.
        away: seconds until a replacement starts to load its models.
    """

    hours: float = math.inf
    away: float = 300.0


@dataclass(frozen=True)
class Forecast:
    """This is the result of one simulation, or of the closed form.

    Args:
        seconds: from the start of the workers to the last row written.
        busy: share of the time that the workers of each stage were at work, by name.
        lost: workers lost, on average where several runs were made.
        redone: blocks that were done again.
    """

    seconds: float
    busy: dict[str, float]
    lost: float = 0.0
    redone: float = 0.0


def bottleneck(job: Job, workers: Sequence[int]) -> str:
    """Return the stage that limits the throughput, or "write"."""
    rates = {stage.name: stage.rate * count for stage, count in zip(job.stages, workers, strict=True)}
    rates["write"] = job.writes
    return min(rates, key=lambda name: rates[name])


def throughput(job: Job, workers: Sequence[int]) -> float:
    """Return prompts per second in the steady state: that of the slowest stage."""
    return min([stage.rate * count for stage, count in zip(job.stages, workers, strict=True)] + [job.writes])


def estimate(job: Job, workers: Sequence[int]) -> Forecast:
    """Estimate the time without failures.

    It is the sum of start-up, whole rounds of blocks through the slowest stage, and one block through each other stage.
    """
    rates = [stage.rate * count for stage, count in zip(job.stages, workers, strict=True)]
    slowest = min(range(len(rates)), key=lambda at: rates[at])
    rounds = math.ceil(job.blocks / workers[slowest])
    work = max(rounds * job.block / job.stages[slowest].rate, job.prompts / job.writes)
    others = sum(job.block / stage.rate for at, stage in enumerate(job.stages) if at != slowest)
    seconds = job.startup + work + others
    busy = {
        stage.name: job.prompts / stage.rate / (count * seconds)
        for stage, count in zip(job.stages, workers, strict=True)
    }
    return Forecast(seconds, busy)


def split(job: Job, workers: int) -> tuple[int, int]:
    """Return the best division of this number of equal workers between two stages: the highest throughput.

    Raises:
        ConfigError: fewer workers than stages, or a job of one stage.
    """
    if len(job.stages) != 2 or workers < 2:
        raise ConfigError("nothing can be divided: there must be at least two stages and two workers")
    first = max(range(1, workers), key=lambda count: throughput(job, (count, workers - count)))
    return first, workers - first


def simulate(job: Job, workers: Sequence[int], failures: Failures | None = None, seed: int = 0) -> Forecast:
    """Simulate the pipeline once.

    A block goes through the stages in order; a worker of the first stage keeps a finished block, and waits, while the
    queue behind it is full. A worker that is lost takes its block with it, which is queued again; its replacement comes
    after `failures.away` seconds and loads for `job.startup`. Rates are constant: what is random is only the losses.
    Large jobs are dealt out in runs of blocks; what a lost worker had finished of its run, block by block, is kept.

    Raises:
        ConfigError: a stage without a worker, or workers that are lost so fast that hardly a block is finished.
    """
    return _Simulation(job, workers, failures or Failures(), random.Random(seed)).run()


def simulate_many(job: Job, workers: Sequence[int], failures: Failures, runs: int = 20) -> tuple[Forecast, float]:
    """Return the means of several simulations, and the 90th percentile of the time.

    Raises ConfigError as `simulate` does.
    """
    part, share = _in_part(job, workers, failures)
    outcomes = [_scaled(simulate(part, workers, failures, seed), job.startup, share) for seed in range(runs)]
    times = sorted(forecast.seconds for forecast in outcomes)
    mean = Forecast(
        sum(times) / runs,
        {name: sum(forecast.busy[name] for forecast in outcomes) / runs for name in outcomes[0].busy},
        sum(forecast.lost for forecast in outcomes) / runs,
        sum(forecast.redone for forecast in outcomes) / runs,
    )
    return mean, times[min(runs - 1, math.ceil(0.9 * runs) - 1)]


def _in_part(job: Job, workers: Sequence[int], failures: Failures) -> tuple[Job, float]:
    """Return the job, or so much of it as has `MOST_LOSSES`, and which share of it that is."""
    losses = sum(workers) * estimate(job, workers).seconds / (failures.hours * HOUR)
    if losses <= MOST_LOSSES:
        return job, 1.0
    least = RUNS_PER_WORKER * max(workers) * job.block
    prompts = min(job.prompts, max(least, int(job.prompts * MOST_LOSSES / losses)))
    return replace(job, prompts=prompts), prompts / job.prompts


def _scaled(forecast: Forecast, startup: float, share: float) -> Forecast:
    """Return what a part says of the whole."""
    if share == 1.0:
        return forecast
    seconds = startup + (forecast.seconds - startup) / share
    return Forecast(seconds, forecast.busy, forecast.lost / share, forecast.redone / share)


def deal(job: Job, workers: Sequence[int]) -> list[int]:
    """Return how many prompts workers are given at a time.

    This is one block or, in a large job, a run of blocks; runs become shorter towards the end.
    """
    sizes, left = [], job.prompts
    while left:
        run = 1 if job.blocks <= SINGLE_BLOCKS else left // (job.block * RUNS_PER_WORKER * max(workers))
        sizes.append(min(left, job.block * max(1, run)))
        left -= sizes[-1]
    return sizes


@dataclass
class _Worker:
    stage: int
    block: int | None = None  # rows that it is at
    since: float = 0.0
    epoch: int = 0  # events of an earlier life count no more
    holding: bool = False


class _Simulation:
    def __init__(self, job: Job, workers: Sequence[int], failures: Failures, rng: random.Random) -> None:
        if len(workers) != len(job.stages) or min(workers) < 1:
            raise ConfigError("every stage needs a worker")
        self.job, self.failures, self.rng = job, failures, rng
        for stage in job.stages:
            seconds, life = job.block / stage.rate, failures.hours * HOUR
            if seconds > LONGEST_BLOCK * life:
                raise ConfigError(
                    f"a block takes {stage.name} {seconds:,.0f} s, and a worker is lost every {life:,.0f} s",
                    hint="take smaller blocks (resources.prompts_per_block)",
                )
        self.workers = [_Worker(stage) for stage, count in enumerate(workers) for _ in range(count)]
        self.queues = [deque(deal(job, workers)), deque[int]()][: len(job.stages)]
        self.idle = [deque[tuple[int, int]]() for _ in job.stages]
        self.holders: deque[tuple[int, int]] = deque()
        self.room = QUEUE_PER_WORKER * workers[-1]
        self.events: list[tuple[float, int, str, int, int]] = []
        self.order = self.done = self.lost = self.redone = 0
        self.busy = [0.0] * len(job.stages)
        self.counts = list(workers)
        self.now = self.written = 0.0

    def run(self) -> Forecast:
        for at in range(len(self.workers)):
            self._push(self.job.startup, "ready", at)
        while self.done < self.job.prompts:
            self.now, _, kind, at, epoch = heapq.heappop(self.events)
            if epoch == self.workers[at].epoch:
                getattr(self, f"_{kind}")(at)
                self._dispatch()
        seconds = max(self.now, self.written)
        shares = {stage.name: self.busy[at] / (self.counts[at] * seconds) for at, stage in enumerate(self.job.stages)}
        return Forecast(seconds, shares, self.lost, self.redone)

    def _push(self, delay: float, kind: str, at: int) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, kind, at, self.workers[at].epoch))

    def _ready(self, at: int) -> None:
        self._free(at)
        if math.isfinite(self.failures.hours):
            self._push(self.rng.expovariate(1 / (self.failures.hours * HOUR)), "gone", at)

    def _gone(self, at: int) -> None:
        worker = self.workers[at]
        self.lost += 1
        if worker.block is not None:
            spent = self.now - worker.since
            single = self.job.block
            if worker.holding:
                kept = (worker.block - 1) // single * single
            else:
                self.busy[worker.stage] += spent
                kept = int(spent * self.job.stages[worker.stage].rate / single) * single
            kept = min(kept, (worker.block - 1) // single * single)
            self.queues[worker.stage].appendleft(worker.block - kept)
            self.redone += 1
            if kept:
                self._passed(worker.stage, kept)
        self.workers[at] = _Worker(worker.stage, epoch=worker.epoch + 1)
        self._push(self.failures.away + self.job.startup, "ready", at)

    def _finished(self, at: int) -> None:
        worker = self.workers[at]
        self.busy[worker.stage] += self.now - worker.since
        if worker.stage < len(self.job.stages) - 1:
            worker.holding = True
            self.holders.append((at, worker.epoch))
            return
        assert worker.block is not None
        self._passed(worker.stage, worker.block)
        self._free(at)

    def _passed(self, stage: int, rows: int) -> None:
        """Rows are through with a stage."""
        if stage < len(self.job.stages) - 1:
            self.queues[-1].append(rows)
        else:
            self.done += rows
            self.written = max(self.now, self.written) + rows / self.job.writes

    def _free(self, at: int) -> None:
        worker = self.workers[at]
        worker.block, worker.holding = None, False
        self.idle[worker.stage].append((at, worker.epoch))

    def _dispatch(self) -> None:
        """Give idle workers work and hand on what is finished, until neither is possible: each makes room."""
        moved = True
        while moved:
            moved = self._hand_on()
            for stage, queue in enumerate(self.queues):
                while queue and self.idle[stage]:
                    at, epoch = self.idle[stage].popleft()
                    worker = self.workers[at]
                    if epoch == worker.epoch:
                        worker.block, worker.since = queue.popleft(), self.now
                        self._push(worker.block / self.job.stages[stage].rate, "finished", at)
                        moved = True

    def _hand_on(self) -> bool:
        moved = False
        while self.holders and len(self.queues[-1]) < self.room:
            at, epoch = self.holders.popleft()
            worker = self.workers[at]
            if epoch == worker.epoch and worker.block is not None:
                self.queues[-1].append(worker.block)
                self._free(at)
                moved = True
        return moved
