"""The answers of the best settings to the same questions, side by side."""

from glmtuner.report.jobs import Job
from glmtuner.report.ranking import Ranking
from glmtuner.report.record_scores import read_answers
from glmtuner.report.run import MAX_ANSWERS, evenly_spaced

MAX_SETTINGS = 3


def best_answers(ranking: Ranking) -> tuple[list[str], list[list[str]]]:
    """Header and rows: question, label, and the answer of each of the best settings that was asked the same questions.

    Both are empty without a winner.
    """
    if ranking.winner is None or ranking.best_job is None:
        return [], []
    winner_answers = answers_by_question(ranking.best_job)
    columns = [(ranking.winner.label, winner_answers)]
    for row in ranking.rows[1:]:
        candidates = map(answers_by_question, row.jobs)
        answers = next((each for each in candidates if each.keys() == winner_answers.keys()), None)
        if answers:
            columns.append((row.label, answers))
        if len(columns) == MAX_SETTINGS:
            break
    header = ["question", "label", *(f"{rank}. {label}" for rank, (label, _) in enumerate(columns, 1))]
    questions = evenly_spaced([*winner_answers], MAX_ANSWERS)
    return header, [[*question, *(answers[question] for _, answers in columns)] for question in questions]


def answers_by_question(job: Job) -> dict[tuple[str, str], str]:
    """The job's answers by question and label, in the order of its predictions."""
    return {(line.prompt, line.label): line.answer for line in read_answers(job.folder)}
