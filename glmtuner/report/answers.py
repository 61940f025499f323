"""Answers of the best runs to the same questions, side by side."""

from glmtuner.report.jobs import Job
from glmtuner.report.ranking import Ranking
from glmtuner.report.run import SHOWN_ANSWERS, evenly
from glmtuner.report.samples import answered

RUNS = 3


def best_answers(board: Ranking) -> tuple[list[str], list[list[str]]]:
    """Header and rows: question, label, and what each of the best runs answered that were asked what the winner was."""
    if board.winner is None or board.chosen is None:
        return [], []
    wanted = answers_of(board.chosen)
    columns = [(board.winner.label, wanted)]
    for row in board.rows[1:]:
        found = next((each for each in map(answers_of, row.jobs) if each.keys() == wanted.keys()), None)
        if found:
            columns.append((row.label, found))
        if len(columns) == RUNS:
            break
    asked = [[*wanted][place] for place in evenly(range(len(wanted)), SHOWN_ANSWERS)]
    header = ["question", "label", *(f"{place}. {label}" for place, (label, _) in enumerate(columns, 1))]
    return header, [[*record, *(found[record] for _, found in columns)] for record in asked]


def answers_of(job: Job) -> dict[tuple[str, str], str]:
    """The job's answers by question and label, in the order in which they were asked."""
    return {(prompt, label): answer for prompt, label, answer in answered(job.folder)}
