"""The whole game in small: ten symbols, and students that find their teachers' frequencies by discriminators alone."""

import torch

from trainway.gad.losses import bradley_terry, group_advantages, policy_loss

GAMES, SYMBOLS, PROMPTS, ANSWERS, STEPS, LAST = 4, 10, 32, 8, 1500, 300


def _total_variation(p, q):
    return (p - q).abs().sum(-1) / 2


def _start(generator):
    """Teachers' frequencies, and students' logits at total variation 0.35 from them; [GAMES, SYMBOLS]."""
    teacher = torch.randn(GAMES, SYMBOLS, generator=generator).softmax(-1)
    other = (2 * torch.randn(GAMES, SYMBOLS, generator=generator)).softmax(-1)
    share = 0.35 / _total_variation(teacher, other)[:, None]
    assert share.max() <= 1
    return teacher, ((1 - share) * teacher + share * other).log().requires_grad_()


def _distances(steps_of_discriminators):
    """Total variation of each student to its teacher, averaged over the last steps; [GAMES].

    Each game is of other frequencies and draws. They are played at once and know nothing of each other: Adam keeps its numbers for each logit.
    """
    generator = torch.Generator().manual_seed(0)
    teacher, logits = _start(generator)
    scores = torch.zeros(GAMES, SYMBOLS, requires_grad=True)
    students = torch.optim.Adam([logits], lr=0.01)
    discriminators = torch.optim.Adam([scores], lr=0.05)
    distances = [_total_variation(logits.detach().softmax(-1), teacher)]
    torch.testing.assert_close(distances[0], torch.full((GAMES,), 0.35))
    # symbols of all games in one table: those of game g begin at g * SYMBOLS
    first = torch.arange(GAMES)[:, None] * SYMBOLS
    for step in range(STEPS):
        drawn = [
            torch.multinomial(frequencies, count, replacement=True, generator=generator) + first
            for frequencies, count in ((logits.detach().softmax(-1), PROMPTS * ANSWERS), (teacher, PROMPTS))
        ]
        answers = drawn[0].view(-1, ANSWERS)  # [GAMES * PROMPTS, ANSWERS]
        taught = drawn[1].flatten()  # [GAMES * PROMPTS]
        rewards = scores.detach().flatten()[answers]  # before the discriminators' update
        if step < steps_of_discriminators:
            found = bradley_terry(scores.detach().flatten()[taught], rewards)
            gradient = torch.zeros(GAMES * SYMBOLS).index_add_(0, taught, found.d_teacher)
            gradient.index_add_(0, answers.flatten(), found.d_student.flatten())
            scores.grad = GAMES * gradient.view_as(scores)  # each game's own mean
            discriminators.step()
        logp = logits.log_softmax(-1).flatten()[answers.flatten()]
        advantages = group_advantages(rewards).flatten()
        loss, _ = policy_loss(logp, advantages, None, None, clip_range=0.2, kl_coef=0.0)
        (logits.grad,) = torch.autograd.grad(loss / (PROMPTS * ANSWERS), logits)
        students.step()
        distances.append(_total_variation(logits.detach().softmax(-1), teacher))
    return torch.stack(distances[-LAST:]).mean(0)


def test_students_find_their_teachers_while_the_discriminators_learn():
    assert _distances(STEPS).max() < 0.1


def test_a_frozen_discriminator_is_hacked():
    assert _distances(100).min() > 0.5
