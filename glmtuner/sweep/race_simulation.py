"""Simulated sweeps, by which the rules of a race are judged: how often the best job is lost, and how many steps are trained.

`python -m glmtuner.sweep.race_simulation` prints the table of docs/race.md. The true loss of job j after the share t of its training
is a power law from the loss that all jobs start with,

    L_j(t) = a_j + (L_0 - a_j) (1 + t / tau_j)^(-c_j),    L_0 = 4,

with an asymptote a_j of N(2, 0.12), an exponent c_j of U(0.3, 1.2) and a time tau_j between 0.003 and 0.1, uniform in its logarithm.
Curves with other exponents and times cross. In the families

- `independent`  a_j, c_j and tau_j have nothing to do with each other;
- `late`         better asymptotes come with longer times (normal scores correlated by 0.5): late bloomers are the rule;
- `annealed`     as `late`, and in addition the learning rate's end brings each job another U(0, 0.25) as cos^2(pi t / 2) falls: what
                 no trend foretells.

A job's weights at a rung are those of one moment: its true loss there is L_j(t) plus N(0, 0.005), for all records alike. The loss
per token of record i is that, times the record's difficulty (gamma, mean 1, standard deviation 0.5: what records have in common in
all jobs), plus what this job makes of this record at all rungs, N(0, 0.15), plus what it makes of it at this rung, N(0, 0.15).
Records have 1 to 100 tokens, uniformly. The best job is that with the lowest true loss at t = 1, without any noise of records.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy
from scipy.special import ndtr

from glmtuner.console import plain
from glmtuner.sweep.race_rules import HALVING, PAIRED, Evaluation, Rule, decide

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

FAMILIES = ("independent", "late", "annealed")
STEPS = 1000  # of every job
RUNGS = (0.08, 0.16, 0.32, 0.5)  # those of conf/hydra/sweeper/race.yaml
START, MEAN_ASYMPTOTE, SPREAD = 4.0, 2.0, 0.12
EXPONENTS, TIMES, CORRELATION, ANNEALED = (0.3, 1.2), (0.003, 0.1), 0.5, 0.25
TRAINING_NOISE, RECORD_NOISE = 0.005, 0.15
DIFFICULTY_SHAPE, MOST_TOKENS = 4.0, 100


@dataclass(frozen=True)
class Outcome:
    """What came of simulated sweeps, as means over them."""

    lost: float  # the share of sweeps whose best job was dropped
    trained: float  # the share of the grid's steps that was trained
    regret: float  # the true loss of the best finished job less that of the best job of the grid
    overtaken: float  # the share of sweeps whose best job was not the best at the first rung


def true_losses(random: numpy.random.Generator, family: str, num_jobs: int, shares: Sequence[float]) -> "Array":
    """The true losses of a sweep's jobs at these shares of the training, [number of shares, jobs]."""
    quality_J = random.normal(size=num_jobs)
    exponents_J = random.uniform(*EXPONENTS, num_jobs)
    slowness_J = random.normal(size=num_jobs)
    if family != "independent":
        slowness_J = numpy.sqrt(1 - CORRELATION**2) * slowness_J - CORRELATION * quality_J
    low, high = numpy.log(TIMES)
    times_J = numpy.exp(low + (high - low) * ndtr(slowness_J))
    asymptotes_J = MEAN_ASYMPTOTE + SPREAD * quality_J
    shares_R1 = numpy.asarray(shares)[:, None]
    losses_RJ = asymptotes_J + (START - asymptotes_J) * (1 + shares_R1 / times_J) ** -exponents_J
    if family == "annealed":
        losses_RJ += random.uniform(0, ANNEALED, num_jobs) * numpy.cos(numpy.pi * shares_R1 / 2) ** 2
    losses: Array = losses_RJ + random.normal(0, TRAINING_NOISE, losses_RJ.shape)
    return losses


def simulate(
    rule: Rule,
    rungs: Sequence[float],
    family: str,
    *,
    seed: int,
    sweeps: int = 2000,
    num_jobs: int = 16,
    num_records: int = 200,
    trend: bool = True,
) -> Outcome:
    """Race that many sweeps of the family by the rule, with the rungs as shares of the training.

    Without the `trend`, a job is dropped that is behind at a rung, whether it catches up or not.
    """
    random = numpy.random.default_rng(seed)
    lost = trained = regret = overtaken = 0.0
    for _ in range(sweeps):
        true_RJ = true_losses(random, family, num_jobs, [*rungs, 1.0])
        tokens_N = random.integers(1, MOST_TOKENS + 1, num_records).astype(float)
        difficulty_N = random.gamma(DIFFICULTY_SHAPE, 1 / DIFFICULTY_SHAPE, num_records)
        taste_JN = random.normal(0, RECORD_NOISE, (num_jobs, num_records))
        racing, reached = list(range(num_jobs)), 0.0
        before: dict[int, Evaluation] | None = None
        for rung, share in enumerate(rungs):
            trained += len(racing) * (share - reached) / num_jobs
            reached = share
            losses_JN = true_RJ[rung][:, None] * difficulty_N + taste_JN
            losses_JN += random.normal(0, RECORD_NOISE, (num_jobs, num_records))
            now = {
                job: Evaluation(str(job), round(share * STEPS), STEPS, losses_JN[job] * tokens_N, tokens_N)
                for job in racing
            }
            earlier = before if trend or before is None else {job: replace(now[job], step=1) for job in racing}
            verdicts = decide(rule, [*now.values()], [earlier[job] for job in racing] if earlier else None)
            racing = [job for job, verdict in zip(racing, verdicts, strict=True) if not verdict.dropped]
            before = now
        trained += len(racing) * (1 - reached) / num_jobs
        best = int(true_RJ[-1].argmin())
        lost += best not in racing
        regret += true_RJ[-1][racing].min() - true_RJ[-1][best]
        overtaken += true_RJ[0].argmin() != best
    return Outcome(lost / sweeps, trained / sweeps, regret / sweeps, overtaken / sweeps)


def main() -> None:
    """Print the outcome of both rules on every family, and of the paired rule on fewer and on more records and without the trend."""
    paired, halving = (Rule.of_race(name, 0.05, 1, 3, len(RUNGS)) for name in (PAIRED, HALVING))
    print("| rule | curves | records | best job dropped | steps trained | regret | best job not first at rung 1 |")
    print("|---|---|---|---|---|---|---|")
    variants = (
        (paired, 200, True),
        (paired, 50, True),
        (paired, 1000, True),
        (paired, 200, False),
        (halving, 200, True),
    )
    for rule, num_records, trend in variants:
        for family in FAMILIES:
            found = simulate(rule, RUNGS, family, seed=20261127, num_records=num_records, trend=trend)
            name = rule.name if trend else f"{rule.name} without the trend"
            row = (
                f"| {name} | {family} | {num_records:,} | {found.lost:.2%} | {found.trained:.1%} | {found.regret:.4f} "
            )
            print(plain(f"{row}| {found.overtaken:.0%} |"))


if __name__ == "__main__":
    main()
