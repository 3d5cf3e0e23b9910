"""Figures of answers and steps: equal to published implementations, and the same on any number of ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from trainway.gad.measures import (
    Answer,
    answer_measures,
    distinct_n,
    group_spread,
    length_correlation,
    pair_accuracy,
    repetition,
    rouge_l,
    step_measures,
)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


# ---- ROUGE-L

ROUGE_SCORE = [
    (
        "The quick brown fox jumps over the lazy dog.",
        "A quick brown dog jumps over the lazy fox!",
        0.6666666666666666,
    ),
    ("It's 42 steps -- and it doesn't stop", "it is 42 steps and it does not STOP", 0.6666666666666666),
    ("def add(a, b):\n    return a + b", "def add(x, y):\n    return x + y  # sum", 0.39999999999999997),
    ("Crème brûlée is a café dessert, naïve or not", "A crème brûlée is a dessert of cafés", 0.64),
    ("snake_case and CamelCase", "snake case and camelcase", 1.0),
    ("the the the the", "the cat", 0.3333333333333333),
    ("police killed the gunman", "the gunman police killed", 0.5),
    ("...", "something", 0.0),
]
"""(candidate, reference, F1 of rougeL by rouge_score 0.1.2 without its stemmer)."""


@pytest.mark.parametrize(("candidate", "reference", "score"), ROUGE_SCORE)
def test_rouge_l_is_that_of_rouge_score(candidate: str, reference: str, score: float) -> None:
    assert rouge_l(candidate, reference) == score


def test_rouge_l_of_random_words_is_that_of_the_plain_dynamic_programme() -> None:
    rng = random.Random(3)
    for _ in range(200):
        a, b = (["abcdefgh"[rng.randrange(8)] for _ in range(rng.randrange(1, 90))] for _ in range(2))
        common = plain_lcs(a, b)
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * common / (len(a) + len(b)), rel=1e-12)


def plain_lcs(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for left in a:
        before = row[:]
        for j, right in enumerate(b, 1):
            row[j] = before[j - 1] + 1 if left == right else max(before[j], row[j - 1])
    return row[-1]


@pytest.mark.parametrize(
    ("candidate", "reference", "score"),
    [
        ("Он пошёл домой вчера", "он пошёл домой", 6 / 7),  # words, whatever their case
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),  # vowel signs are parts of words
        ("我喜欢猫", "我喜欢狗", 3 / 4),  # characters
        ("我用 Python 3 写", "我用 Python 写程序", 8 / 11),  # and words among them
        ("👍 👍", "👍", 2 / 3),
        ("= + =", "= - =", 2 / 3),
        ("été à Paris", "Été à Paris", 1.0),
        ("Paris", "", 0.0),
        ("", "Paris", 0.0),
        ("!!!", "Paris", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_of_other_scripts(candidate: str, reference: str, score: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(score, rel=1e-12)


def test_the_reference_alone_decides_what_a_word_is() -> None:
    # as Latin words this would be 1: "python" is all there is
    assert rouge_l("Python", "Я люблю программировать на Python") == pytest.approx(2 * (1 / 5) / (1 + 1 / 5))
    # a word of another script in a Latin text counts for nothing, as in rouge_score
    assert rouge_l("the word мир means peace", "the word means peace") == 1.0


# ---- variety


def test_distinct_n_counts_over_all_answers() -> None:
    answers = [tokens(1, 2, 1, 2), tokens(1, 2, 3), tokens(9), tokens()]
    assert distinct_n(answers, 1) == 4 / 8
    assert distinct_n(answers, 2) == 3 / 5  # 12 21 12 12 23; never across answers
    assert distinct_n(answers, 3) == 3 / 3
    assert distinct_n(answers, 5) == 0.0
    assert distinct_n([], 2) == 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_distinct_n_is_that_of_sets(n: int) -> None:
    rng = np.random.default_rng(5)
    answers = [rng.choice([0, 7, 151_935, 2**31 - 2], size=size).astype(np.int32) for size in range(40)]
    grams = [tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1)]
    assert distinct_n(answers, n) == len(set(grams)) / len(grams)


def test_repetition() -> None:
    assert repetition(tokens(1, 2, 3, 4, 5)) == 0.0
    assert repetition(tokens(*[7, 8] * 10)) == 1 - 2 / 17
    assert repetition(tokens(1, 1, 1)) == 0.0  # no 4-gram at all


# ---- scores


def test_length_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 1500, size=500)
    scores = 0.01 * lengths + rng.normal(size=500) * 4
    assert length_correlation(scores, lengths) == pytest.approx(np.corrcoef(scores, lengths)[0, 1], rel=1e-12)
    assert length_correlation(-scores, lengths) == pytest.approx(-np.corrcoef(scores, lengths)[0, 1])


def test_length_correlation_is_within_groups() -> None:
    # longer answers score lower in each group, though the group of long ones scores higher
    scores = np.array([[1.0, 0.0], [11.0, 10.0]])
    lengths = np.array([[10, 20], [100, 110]])
    assert length_correlation(scores, lengths) == pytest.approx(-1.0)
    assert length_correlation(scores.ravel(), lengths.ravel()) > 0.9


@pytest.mark.parametrize(
    ("scores", "lengths"),
    [
        ([0.1, 0.1, 0.1], [1, 2, 3]),  # their mean is a rounding off
        ([1.0, 2.0, 3.0], [5, 5, 5]),
        ([[0.1] * 3, [0.7] * 3], [[1, 2, 3], [3, 2, 2]]),
        ([], []),
    ],
)
def test_length_correlation_is_0_where_undefined(scores: list[float], lengths: list[int]) -> None:
    assert length_correlation(np.array(scores), np.array(lengths)) == 0.0


def test_group_spread() -> None:
    rewards = np.array([[1.0, 3.0], [2.0, 2.0], [0.5, 0.5 + 5e-7], [0.0, 4.0]])
    spread = group_spread(rewards)
    assert spread.collapsed == 0.5
    assert spread.std == pytest.approx((math.sqrt(2) + math.sqrt(8)) / 4, rel=1e-6)
    assert group_spread(rewards[:1].astype(np.float32)) == (0.0, math.sqrt(2))


def test_pair_accuracy_counts_ties_half() -> None:
    assert pair_accuracy(np.array([1.0, 0.0]), np.array([[0.0, 1.0], [0.0, -1.0]])) == 3 / 4
    assert pair_accuracy(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0.5


# ---- a validation


def some_answers(count: int) -> list[Answer]:
    rng = random.Random(11)
    words = "a red fox ran far over some hill".split()
    return [
        Answer(
            tokens=tokens(*[rng.randrange(20) for _ in range(rng.randrange(1, 30))]),
            text=" ".join(rng.choices(words, k=rng.randrange(1, 30))),
            truncated=rng.random() < 0.3,
            teacher_length=rng.randrange(1, 40),
            teacher_text=" ".join(rng.choices(words, k=rng.randrange(1, 30))),
            score=rng.gauss(0, 2),
            teacher_score=rng.gauss(1, 2),
        )
        for _ in range(count)
    ]


def on_ranks(shares: Sequence[Sequence[Answer]], everything: list[np.ndarray]) -> list[dict[str, float]]:
    """What each rank gets: once through to hear what each gives to the sum, once more with the sums."""
    given: list[tuple[float, ...]] = []

    def listen(*values: float) -> list[float]:
        given.append(values)
        return [1.0] * len(values)

    for share in shares:
        answer_measures(share, everything, listen)
    sums = [sum(values) for values in zip(*given, strict=True)]
    return [answer_measures(share, everything, lambda *values: sums) for share in shares]


def test_a_validation_is_the_same_on_any_number_of_ranks() -> None:
    answers = some_answers(23)
    everything = [answer.tokens for answer in answers]
    (alone,) = on_ranks([answers], everything)
    assert alone == answer_measures(answers, everything, lambda *values: list(values))
    for world_size in (2, 5, 40):  # of 40 ranks most have no answer
        for found in on_ranks([answers[rank::world_size] for rank in range(world_size)], everything):
            assert found == pytest.approx(alone, rel=1e-13)
    assert alone["val/rouge_l"] == pytest.approx(np.mean([rouge_l(a.text, a.teacher_text) for a in answers]))
    assert alone["val/length"] == np.mean([len(a.tokens) for a in answers])
    assert alone["val/teacher_length"] == np.mean([a.teacher_length for a in answers])
    assert alone["val/truncated"] == np.mean([a.truncated for a in answers])
    assert alone["val/repetition"] == pytest.approx(np.mean([repetition(a.tokens) for a in answers]))
    assert alone["val/distinct_2"] == distinct_n(everything, 2)
    assert alone["val/discriminator_accuracy"] == np.mean([a.teacher_score > a.score for a in answers])
    assert alone["val/student_score"] == pytest.approx(np.mean([a.score for a in answers]))
    assert alone["val/teacher_score"] == pytest.approx(np.mean([a.teacher_score for a in answers]))


def test_scores_are_averaged_over_what_was_scored() -> None:
    answers = some_answers(6)
    some = [answers[0]._replace(score=None), answers[1]._replace(teacher_score=None), *answers[2:]]
    for found in on_ranks([some[:2], some[2:]], [answer.tokens for answer in some]):
        assert found["val/student_score"] == pytest.approx(np.mean([a.score for a in answers[2:]]))
        assert found["val/length"] == np.mean([len(a.tokens) for a in answers])


def test_without_a_discriminator_there_are_no_scores() -> None:
    answers = [answer._replace(score=None, teacher_score=None) for answer in some_answers(4)]
    (found,) = on_ranks([answers], [answer.tokens for answer in answers])
    assert sorted(found) == [
        "val/distinct_2",
        "val/length",
        "val/repetition",
        "val/rouge_l",
        "val/teacher_length",
        "val/truncated",
    ]


# ---- a step


def test_step_measures() -> None:
    scores = np.array([[1.0, 3.0, 2.0], [0.5, 0.5, 0.5]], dtype=np.float32)
    teacher = np.array([2.0, 1.0], dtype=np.float32)
    found = step_measures(
        scores=scores,
        teacher_scores=teacher,
        lengths=np.array([[10, 30, 20], [1, 40, 1]]),
        teacher_lengths=np.array([20, 30]),
        truncated=np.array([[False, False, False], [False, True, True]]),
        policy_tokens=102.0,
        policy_sums={"kl": 5.1, "entropy": 51.0, "clipped": 0.0},
        seconds={"rollout": 1.5, "student": 2.5},
    )
    pairs = [-1.0, 1.0, 0.0, -0.5, -0.5, -0.5]  # the student's score less the teacher's
    softplus = [math.log(1 + math.exp(pair)) for pair in pairs]
    assert found.pop("gad/discriminator_loss") == pytest.approx(np.mean(softplus), rel=1e-14)
    assert found.pop("gad/response_length_std") == pytest.approx(np.std([10, 30, 20, 1, 40, 1]))
    assert found == {
        "gad/discriminator_accuracy": 4.5 / 6,
        "gad/margin": 0.25,
        "gad/teacher_score": 1.5,
        "gad/student_score": 1.25,
        "gad/reward_std": 0.5,
        "gad/collapsed_groups": 0.5,
        "gad/score_length_correlation": pytest.approx(20 / math.sqrt(2 * (200 + 26**2 + 2 * 13**2))),
        "gad/response_length": 17.0,
        "gad/teacher_length": 25.0,
        "gad/truncated": 2 / 6,
        "gad/empty": 1 / 6,  # the other answer of one token was cut off
        "gad/kl": pytest.approx(0.05),
        "gad/entropy": 0.5,
        "gad/clipped": 0.0,
        "gad/rollout_s": 1.5,
        "gad/student_s": 2.5,
    }
    assert all(type(value) is float for value in found.values())


def test_equal_scores_give_ln_2_and_half() -> None:
    same = {
        "lengths": np.full((4, 2), 7),
        "teacher_lengths": np.full(4, 7),
        "truncated": np.zeros((4, 2), bool),
    }
    found = step_measures(
        scores=np.full((4, 2), 12.3, np.float32), teacher_scores=np.full(4, 12.3, np.float32), **same
    )
    assert found["gad/discriminator_loss"] == pytest.approx(math.log(2), rel=1e-15)
    assert found["gad/discriminator_accuracy"] == 0.5
    assert (found["gad/collapsed_groups"], found["gad/score_length_correlation"]) == (1.0, 0.0)
    assert "gad/kl" not in found


def test_far_scores_overflow_nothing() -> None:
    same = {
        "lengths": np.array([[3, 4]]),
        "teacher_lengths": np.array([5]),
        "truncated": np.zeros((1, 2), bool),
    }
    found = step_measures(scores=np.array([[1e4, 2e4]]), teacher_scores=np.array([-1e4]), **same)
    assert found["gad/discriminator_loss"] == 2.5e4
    assert found["gad/margin"] == -2.5e4
