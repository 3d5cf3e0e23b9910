"""One process of `time_to_loss.py`: training by a peer, or the validation of the weights that it left.

python benchmarks/time_to_loss_arms.py trainer|litgpt|evaluate DIR, where DIR/job.json says what to train on

litgpt's arm runs in litgpt's environment, which has no Trainway: heavy imports stand in the functions that need them.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
MODEL = {"hidden_size": 192, "num_layers": 6, "num_heads": 3, "intermediate_size": 512, "max_seq_len": 256}
VOCAB, SEQ_LEN, ROWS, SEED = 8192, 256, 8, 42
BETAS, DECAY, MAX_NORM, MIN_LR_RATIO = (0.9, 0.95), 0.1, 1.0, 0.1


def main() -> None:
    name, directory = sys.argv[1], Path(sys.argv[2])
    job = json.loads((directory / "job.json").read_text())
    {"trainer": run_trainer, "litgpt": run_litgpt, "evaluate": run_evaluation}[name](directory, job)


class Clock:
    """Seconds of training at the end of each step, without pauses; starts with the first batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._started: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def step_ended(self) -> None:
        assert self._started is not None
        self.ends.append(time.perf_counter() - self._started - self._paused)

    def off(self, work: Callable[[], None]) -> None:
        begun = time.perf_counter()
        work()
        if self._started is not None:
            self._paused += time.perf_counter() - begun


def run_trainer(directory: Path, job: dict[str, Any]) -> None:
    """transformers.Trainer, tuned for a CPU: fp32, SDPA, fused AdamW, nothing logged or saved."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from trainway.models.load import transformer_config

    torch.set_num_threads(THREADS)
    rows = torch.from_numpy(np.load(job["rows"])).long()
    clock, first_losses = Clock(), []
    model = LlamaForCausalLM(transformer_config(model_config(), VOCAB, None, None, None))
    model.load_state_dict(load_file(job["weights"]), strict=False)  # the tied head is not in the file
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            clock.start()
            targets = rows[index, 1:]  # already shifted, so that all arms have the same targets
            return {"input_ids": rows[index, :-1], "labels": targets, "shift_labels": targets}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_ended()
            if state.global_step % job["every"] == 0 or state.global_step == job["steps"]:
                clock.off(lambda: export_weights(directory, state.global_step, model.state_dict()))

    class SameRates(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            factors = [*job["rate_factors"], 0.0]  # after the last step it is asked once more
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: factors[step]
            )
            return self.lr_scheduler

    def first_loss(module: Any, args: Any, output: Any) -> None:
        first_losses.append(output.loss.item())
        hook.remove()

    hook = model.register_forward_hook(first_loss)
    export_weights(directory, 0, model.state_dict())
    arguments = TrainingArguments(
        str(directory / "trainer"), per_device_train_batch_size=ROWS, max_steps=job["steps"], optim="adamw_torch_fused",
        learning_rate=job["rates"]["adamw"], adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY,
        max_grad_norm=MAX_NORM, save_strategy="no", logging_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", bf16=False,
        gradient_checkpointing=False, remove_unused_columns=False, dataloader_pin_memory=False, seed=SEED,
    )  # fmt: skip
    SameRates(model, arguments, train_dataset=Rows(), callbacks=[Watch()]).train()
    write_raw(directory, clock, first_losses[0])


def run_litgpt(directory: Path, job: dict[str, Any]) -> None:
    """litgpt's own `pretrain.setup`, compiled as it ships; fused AdamW, and no decay of vectors, as the other arms."""
    import litgpt.pretrain as pretrain
    import numpy as np
    import torch
    from lightning.fabric.wrappers import _unwrap_objects
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from safetensors.torch import load_file

    torch.set_num_threads(THREADS)
    rows = torch.from_numpy(np.load(job["rows"])).long()
    clock, first_losses = Clock(), []
    config = Config(
        name="llama", block_size=SEQ_LEN, n_layer=MODEL["num_layers"], n_embd=MODEL["hidden_size"],
        n_head=MODEL["num_heads"], n_query_groups=MODEL["num_heads"], intermediate_size=MODEL["intermediate_size"],
        vocab_size=VOCAB, padded_vocab_size=VOCAB, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP",
    )  # fmt: skip

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            clock.start()
            return rows[index]

    class Data(DataModule):
        def connect(
            self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None
        ) -> None:
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Rows(), batch_size=self.batch_size, shuffle=False)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows[:1])

    def export(model: Any) -> None:
        exported: dict[str, Any] = {}
        copy_weights_llama(config, exported, dict(_unwrap_objects(model).state_dict()))
        export_weights(directory, len(clock.ends), exported)

    def validate(fabric: Any, model: Any, loader: Any, **kwargs: Any) -> Any:
        clock.off(lambda: export(model))  # validated later by the function that all arms share
        return torch.zeros(())

    def cross_entropy(logits: Any, targets: Any, **kwargs: Any) -> Any:
        loss = plain_cross_entropy(logits, targets, **kwargs)
        if not first_losses and logits.device.type != "meta":
            first_losses.append(loss.item())
        return loss

    plain_cross_entropy = pretrain.chunked_cross_entropy
    pretrain.validate, pretrain.chunked_cross_entropy = validate, cross_entropy
    pretrain.save_checkpoint = lambda *args, **kwargs: None
    pretrain.get_lr = lambda rate, step, *args: rate * job["rate_factors"][step]
    initial: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, initial, load_file(job["weights"]))
    (directory / "initial").mkdir()
    torch.save(initial, directory / "initial" / "lit_model.pth")
    sys.argv = sys.argv[:1]
    # litgpt finds the optimiser by its module's name
    sys.modules["peer_optimizer"] = types.ModuleType("peer_optimizer")
    sys.modules["peer_optimizer"].FusedAdamW = fused_adamw(clock.step_ended)  # type: ignore[attr-defined]
    pretrain.setup(
        model_name="llama", model_config=config, out_dir=(directory / "out").resolve(), precision="32-true",
        initial_checkpoint_dir=(directory / "initial").resolve(), data=Data(), devices=1, seed=SEED,
        logger_name="csv", eval=EvalArgs(interval=job["every"], max_iters=1, final_validation=False),
        train=TrainArgs(
            save_interval=None, log_interval=100, global_batch_size=ROWS, micro_batch_size=ROWS,
            max_tokens=job["steps"] * ROWS * SEQ_LEN, max_norm=MAX_NORM, tie_embeddings=True,
            lr_warmup_steps=job["warmup"],
        ),
        optimizer={
            "class_path": "peer_optimizer.FusedAdamW",
            "init_args": {"lr": job["rates"]["adamw"], "betas": BETAS, "weight_decay": DECAY},
        },
    )  # fmt: skip
    write_raw(directory, clock, first_losses[0])


def fused_adamw(ended: Callable[[], None]) -> Any:
    """AdamW for litgpt: fused, which it asks for on GPUs only, and matrices alone decayed; tells when a step ended."""
    import torch

    class FusedAdamW(torch.optim.AdamW):
        def __init__(self, params: Any, lr: float, betas: Any, weight_decay: float) -> None:
            parameters = list(params)
            groups = [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
            super().__init__(groups, lr=lr, betas=tuple(betas), fused=True)

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            result = super().step(closure)
            ended()
            return result

    return FusedAdamW


def run_evaluation(directory: Path, job: dict[str, Any]) -> None:
    """Validation loss of every set of weights that an arm has left."""
    files = sorted((directory / "weights").glob("*.safetensors"), key=lambda path: int(path.stem))
    losses = {path.stem: validation_loss(path, job) for path in files}
    (directory / "losses.json").write_text(json.dumps(losses))


def validation_loss(weights: Path, job: dict[str, Any]) -> float:
    """Nats per token on the held-out rows, by the function and on the rows that Trainway's own validation takes."""
    import torch
    from safetensors.torch import load_file

    from trainway.data.loader import validation_batches
    from trainway.data.store import TokenStore
    from trainway.engines.world import World
    from trainway.models.causal_lm import CausalLMLoss
    from trainway.models.load import build_model
    from trainway.training.evaluate import evaluate_batches

    torch.set_num_threads(THREADS)
    store = TokenStore.open(Path(job["store"]), verify=False)
    model = build_model(model_config(), VOCAB, seed=0)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    batches = validation_batches(
        store.split("val"),
        seq_len=SEQ_LEN,
        micro_batch_size=ROWS,
        packing="concat",
        max_tokens=job["val_tokens"],
    )
    world = World(0, 0, 1, 1, torch.device("cpu"))
    return evaluate_batches(CausalLMLoss(model), batches, store.token_bytes, world, "fp32")["val/loss"]


def model_config() -> Any:
    from trainway.config.schema import ModelConfig

    return ModelConfig.model_validate(MODEL)


def export_weights(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Keep the weights after `step` under transformers' names, to be validated after the arm has ended."""
    (directory / "weights").mkdir(exist_ok=True)
    save_weights(directory / "weights" / f"{step}.safetensors", state)


def save_weights(path: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    kept = {
        name: tensor.detach().clone() for name, tensor in state.items() if name != "lm_head.weight"
    }  # tied
    save_file(kept, str(path))


def write_raw(directory: Path, clock: Clock, first_train_loss: float) -> None:
    (directory / "raw.json").write_text(
        json.dumps({"ends": clock.ends, "first_train_loss": first_train_loss})
    )


if __name__ == "__main__":
    main()
