"""Independent implementations agree: the losses of TRL's GRPO and reward trainers on the same tensors."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.base_models import save, tiny_model, tiny_tokenizer
from trainway.gad.losses import PolicyStats, bradley_terry
from trainway.gad.measures import pair_accuracy
from trainway.gad.student import LogProbs, Policy, StudentLoss
from trainway.models.attention import use_packed_attention

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}
LENGTHS = ((3, 7), (5, 2), (2, 9), (4, 4))
"""Tokens of each prompt and each answer."""


@pytest.fixture(scope="module", autouse=True)
def alone():
    """accelerate takes a variable of torchrun, such as DeepSpeed leaves behind in a process, for a launcher."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def sequences():
    """Pairs of prompt and answer, [P] and [T] int64, with ids that are no padding."""
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(3, 80, (length,), generator=generator) for length in pair) for pair in LENGTHS
    ]


def _packed(sequences):
    """All sequences in one row: ids, labels, positions, boundaries, positions of the answers' labels."""
    ids = torch.cat([torch.cat(pair) for pair in sequences])
    ends = torch.tensor([len(prompt) + len(answer) for prompt, answer in sequences]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    positions = torch.cat([torch.arange(stop - start) for start, stop in zip(starts, ends, strict=True)])
    targets = torch.cat(
        [
            torch.arange(start + len(prompt) - 1, stop - 1)
            for start, stop, (prompt, _) in zip(starts, ends, sequences, strict=True)
        ]
    )
    labels = ids.roll(-1)
    return ids[None], labels[None], positions[None], (0, *ends), targets


def _padded(sequences, parts):
    """TRL's inputs: prompts padded on the left, answers on the right, and each token's values in a row of its own."""
    prompts, answers = zip(*sequences, strict=True)

    def padded(rows, side, fill=0):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)

    lengths = [len(answer) for answer in answers]
    return {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([torch.ones_like(x) for x in prompts], "left"),
        "completion_ids": padded(answers, "right"),
        "completion_mask": padded([torch.ones_like(x) for x in answers], "right"),
        **{name: padded(values.split(lengths), "right") for name, values in parts.items()},
    }


def _grpo(tmp_path, family, **settings):
    """A trainer of TRL with a model of random weights; it trains nothing."""
    args = trl.GRPOConfig(
        str(tmp_path / "run"), loss_type="bnpo", scale_rewards="none", num_generations=2, per_device_train_batch_size=2,
        # its own default weighs k3 by the ratio (arXiv 2512.02556)
        use_bias_correction_kl=False,
        **settings, **QUIET,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        str(
            save(tiny_model(family), tmp_path / "model")
        ),  # a path: with a beta the trainer loads a reference too
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "ab"}]),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.double().train()
    return trainer


@pytest.mark.parametrize(
    ("family", "off_policy", "temperature", "beta", "delta"),
    [
        ("llama", 0.4, 0.8, 0.05, None),
        ("qwen2", 1.0, 1.0, 0.3, 2.5),
        ("qwen2", 0.0, 0.6, 0.001, None),
        ("granite", 0.4, 0.8, 0.0, None),
    ],
)
def test_policy_loss_equals_trls_grpo(tmp_path, sequences, family, off_policy, temperature, beta, delta):
    trainer = _grpo(tmp_path, family, beta=beta, epsilon=0.2, temperature=temperature, delta=delta)
    student = StudentLoss(tiny_model(family).double(), chunk_tokens=5)
    use_packed_attention(student.model)
    batch, num_tokens = _packed(sequences), sum(answer for _, answer in LENGTHS)
    with torch.no_grad():
        logp, _ = student(*batch, objective=LogProbs(temperature))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, num_tokens, generator=generator)
    old = logp + off_policy * noise[0] if off_policy else None
    ref = logp + 0.2 * noise[1]
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.5])
    parts = {"old_per_token_logps": old, "ref_per_token_logps": ref}
    inputs = _padded(sequences, {name: values for name, values in parts.items() if values is not None})
    expected = trainer._compute_loss(trainer.model, inputs | {"advantages": advantages})
    expected.backward()

    each = advantages.repeat_interleave(torch.tensor([answer for _, answer in LENGTHS]))
    objective = Policy(temperature, each, old, ref, clip_range=0.2, dual_clip=delta, kl_coef=beta)
    loss, stats = student(*batch, objective=objective)
    (loss / num_tokens).backward()
    torch.testing.assert_close(loss / num_tokens, expected, rtol=1e-7, atol=1e-7)
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (student.model, trainer.model)
    )
    assert (ours - theirs).norm() < 1e-6 * theirs.norm() and theirs.norm() > 0.1

    stats = PolicyStats(*(stats / num_tokens).tolist())
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert stats.entropy == pytest.approx(metrics["entropy"], rel=1e-5)
    assert stats.kl == pytest.approx(metrics["kl"], rel=1e-4) if beta else stats.kl > 0
    if delta is None:  # TRL counts as unclipped what delta alone holds
        assert stats.clipped == pytest.approx(metrics["clip_ratio/region_mean"])
    assert bool(off_policy) == (stats.clipped > 0)


@pytest.fixture(scope="module")
def reward_trainer(tmp_path_factory):
    config = tiny_model("llama").config
    config.num_labels = 1
    rows = [{"chosen_ids": [1, 5, 2], "rejected_ids": [1, 6, 2]}]
    trainer = trl.RewardTrainer(
        AutoModelForSequenceClassification.from_config(config),
        args=trl.RewardConfig(str(tmp_path_factory.mktemp("reward")), **QUIET),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_bradley_terry_equals_trls_reward_loss(reward_trainer, answers, spread):
    """Of several answers, the teacher's is paired with each."""
    generator = torch.Generator().manual_seed(0)
    teacher = (spread * torch.randn(6, generator=generator)).requires_grad_()
    student = (spread * torch.randn(6, answers, generator=generator)).requires_grad_()
    pairs = torch.cat([teacher.repeat_interleave(answers), student.flatten()])[:, None]
    expected = reward_trainer.compute_loss(
        lambda **_: SimpleNamespace(logits=pairs), {"attention_mask": torch.ones(1)}
    )
    expected.backward()
    found = bradley_terry(teacher.detach(), student.detach())
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.d_teacher, teacher.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.d_student, student.grad, rtol=1e-5, atol=1e-7)
    metrics = {
        name: values[-1] for name, values in reward_trainer._metrics["train"].items() if name != "num_tokens"
    }
    accuracy = pair_accuracy(teacher.detach().numpy(), student.detach().numpy())
    assert accuracy == pytest.approx(metrics["accuracy"])
