"""The run configuration: every setting, its type, its bounds and its default. The only home of defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, StringConstraints

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_PART = r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*"
RepositoryName = Annotated[str, StringConstraints(pattern=rf"^{_PART}/{_PART}$", max_length=96)]
"""OWNER/NAME on the Hub."""
ModelName = Annotated[str, StringConstraints(pattern=rf"^({_PART}/)?{_PART}$", max_length=96)]
"""A model on the Hub; the oldest ones have no owner."""
TagName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_.+-]*[A-Za-z0-9_+-])?$", max_length=100)
]
LicenceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.+-]*$", max_length=64)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The model: one to start from (`path`), or a new decoder-only transformer of the shape given here."""

    path: str | None = None
    """The model to start from: a Hub id, or a local directory in Hugging Face's format; empty means a new one."""
    revision: str | None = None
    """Commit, tag or branch of a model on the Hub; empty means the newest, kept when a run goes on."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository brings along; needs a revision of 40 hex digits."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """How attention is computed. packed: our own, within documents only, on CPUs and GPUs; the others are
    transformers' own of that name. auto: packed where the model allows it, else sdpa."""
    architecture: Literal["llama", "qwen3"] = "llama"
    """Model family; the exported model loads with transformers' class of that name."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Number of decoder blocks."""
    num_heads: PositiveInt = 4
    """Number of query heads."""
    num_kv_heads: PositiveInt | None = None
    """Number of key and value heads; empty means as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; empty means hidden_size / num_heads."""
    intermediate_size: PositiveInt = 704
    """Width of the gated feed-forward layer."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; empty means the tokenizer's size, rounded up to a multiple of 64."""
    max_seq_len: PositiveInt = 2048
    """Longest sequence that the model accepts, in tokens."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Share one matrix between the input embedding and the output head."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""


class TokenizerConfig(Section):
    """Reuse a tokenizer (`path`) or train a byte-level BPE on the training documents."""

    path: str | None = None
    """A bundle written by Trainway or transformers, or a published tokenizer.json; empty means train one."""
    vocab_size: Annotated[int, Field(ge=258, le=1_000_000)] = 32000
    """Size of a newly trained vocabulary, special tokens included."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens of a newly trained tokenizer, beside <|bos|>, <|eos|> and <|pad|>."""
    sample_mib: PositiveInt = 256
    """How much text, in MiB, a new tokenizer is trained on."""


class SourceConfig(Section):
    """One source of a mix. A bare string in data.train is a source with these defaults."""

    path: str
    """A file, a directory or a pattern."""
    name: str | None = None
    """Name of the source in logs and reports; empty means its path."""
    weight: PositiveFloat | None = None
    """Share of the training rows, relative to the other sources' weights; all sources have one, or none has."""
    epochs: PositiveFloat | None = None
    """Passes over this source for each pass over the mix; empty means 1. An alternative to weights."""
    optional: bool = False
    """A source that may be absent: it is then left out, with a line in the log."""


class DataConfig(Section):
    """Where the documents come from and how they become rows of tokens."""

    train: tuple[str | SourceConfig, ...] = ()
    """Training sources: files, directories or patterns; .txt, .text, .md, .py as text, .jsonl, .ndjson, .json as one
    record a line, each also with .gz; .parquet and .csv. A source with a weight, epochs or a name of its own is
    written as {path: FILE, weight: 2}."""
    validation: tuple[str, ...] = ()
    """Validation sources; empty means a share of the training documents is held out (val_ratio)."""
    val_ratio: Share = 0.01
    """Share of the training documents held out when there are no validation sources."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What one document is in a plain text file."""
    text_field: str = "text"
    """Field of a JSON record that holds its text."""
    on_bad_record: Literal["error", "quarantine"] = "error"
    """A malformed record ends the preparation, or is set aside in a quarantine file and counted."""
    max_document_mib: PositiveInt = 64
    """A longer document counts as malformed."""
    dedup: bool = False
    """Leave out training documents whose text was there before, in any source; they are counted."""
    packing: Literal["documents", "concat", "none"] = "documents"
    """documents: rows are full and attention never crosses a document (sft: whole conversations, best fit); concat:
    one stream, attention crosses (pretrain only); none: one conversation a row, padded (sft only)."""
    prompt_field: str = "content"
    """gad: the field that holds the conversation up to the teacher's turn."""
    response_field: str = "teacher_response"
    """gad: the field that holds what the teacher answered."""
    max_prompt_tokens: PositiveInt = 2048
    """gad: longest prompt; what data.over_length does with a longer one never takes the newest turn."""
    max_response_tokens: PositiveInt = 1536
    """gad: longest answer, of the teacher and of the student; a longer one of the teacher is cut under truncate."""
    chat_template: str | None = None
    """How sft and gad render conversations: a .jinja file, or the name of a known one; empty means the tokenizer's own."""
    train_on: Literal["assistant", "completion", "all"] = "assistant"
    """What sft learns: every assistant turn, the last one alone, or every token."""
    over_length: Literal["truncate", "drop", "error"] = "truncate"
    """What sft does with a row longer than train.seq_len. truncate: leave out its oldest turns, keeping the system
    prompt and the last exchange, and drop it when that is still too long; every case is counted and listed."""
    store_dir: str = "cache"
    """Directory of the prepared token stores; each is named by the hash of what it was made from."""
    shuffle: bool = True
    """Visit the rows of each epoch in a random order that depends on the seed alone."""
    prefetch_steps: PositiveInt = 4
    """How many steps' batches the background reader holds ready."""


class TrainConfig(Section):
    """The length of the run, its batch, its numerics."""

    total_steps: PositiveInt | None = None
    """Optimiser steps of the run; empty means it follows from epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows; an alternative to total_steps."""
    seq_len: PositiveInt = 512
    """Tokens in a row."""
    global_batch_size: PositiveInt | None = None
    """Rows of one optimiser step, over all ranks; empty means micro_batch_size x grad_accum_steps x ranks."""
    micro_batch_size: PositiveInt = 8
    """Rows that one rank takes through the model at once."""
    grad_accum_steps: PositiveInt | None = None
    """Micro-batches of one rank per step; empty means it follows from global_batch_size."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; weights stay fp32. auto: what the hardware does well."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: keep only each block's input and recompute the rest in the backward pass; selective: keep the results of
    matrix products and attention too, and recompute what is cheap."""
    compile: bool = False
    """Compile each block with torch.compile."""
    loss_chunk_tokens: PositiveInt = 1024
    """The cross-entropy holds the logits of at most this many tokens at a time."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log of the softmax's normaliser, which keeps logits from drifting; 0 turns it off."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A step whose loss or gradient is NaN or infinite is left out, or ends the run."""
    spike_factor: Annotated[float, Field(ge=0)] = 0.0
    """Leave out a step whose gradient norm exceeds this multiple of the recent median; 0 turns it off."""
    max_skipped_steps: PositiveInt = 20
    """So many left-out steps in a row end the run."""
    num_threads: PositiveInt | None = None
    """CPU threads of one rank; empty means the physical cores divided among the ranks."""


class LoraConfig(Section):
    """Low-rank adapters on a frozen model (Hu et al. 2021, arXiv 2106.09685), by peft; any setting turns them on."""

    enabled: bool = False
    """Train adapters, and leave the model itself as it is."""
    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Adapters are scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters of modules; must be 0 with target_parameters."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Modules with an adapter, by the end of their names, or one regular expression; all-linear: every linear layer
    but the head."""
    target_parameters: tuple[str, ...] = ()
    """Parameters with an adapter that are no module's own weight, such as the experts of a mixture:
    7.mlp.experts.gate_up_proj."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks for some targets, by the end of their names or a regular expression."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Other alphas for some targets."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Learn magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapters, such as lm_head."""
    quantize: Literal["none", "4bit"] = "none"
    """Hold the frozen model in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314); needs the extra qlora."""


class GadConfig(Section):
    """Adversarial distillation from a teacher of which only the text is known (GAD, arXiv 2511.10643)."""

    stage: Literal["seqkd", "warmup", "adversarial", "all"] = "all"
    """seqkd: learn the teacher's answers alone, the baseline; warmup: a discriminator learns to tell them from the
    student's, then the student learns them too; adversarial: the discriminator's score is the student's reward; all:
    warmup, then adversarial."""
    seqkd_epochs: PositiveFloat = 2
    """Passes over the prompts in stage seqkd."""
    warmup_epochs: PositiveFloat = 2
    """Passes over the prompts in stage warmup."""
    adversarial_epochs: PositiveFloat = 4
    """Passes over the prompts in stage adversarial."""
    seqkd_steps: PositiveInt | None = None
    """Steps of stage seqkd; empty means they follow from seqkd_epochs."""
    warmup_steps: PositiveInt | None = None
    """Steps of stage warmup; empty means they follow from warmup_epochs."""
    adversarial_steps: PositiveInt | None = None
    """Steps of stage adversarial; empty means they follow from adversarial_epochs."""
    warmup_run: str | None = None
    """Where stage adversarial begins: a run directory of a warm-up, for its newest checkpoint, or one checkpoint's."""
    discriminator_only_steps: NonNegativeInt = 10
    """First steps of the warm-up in which the discriminator alone learns."""
    discriminator: str | None = None
    """A model of the same tokenizer to start the discriminator from, as in model.path; empty means the student's."""
    discriminator_lr: PositiveFloat | None = None
    """Peak learning rate of the discriminator; empty means optim.lr."""
    seqkd_lr: PositiveFloat = 5e-6
    """Peak learning rate of stage seqkd."""
    tokens_per_gpu: PositiveInt = 12288
    """Tokens, prompts and answers, that one rank takes through a model at once; a longer sequence goes alone."""
    prompts_per_update: PositiveInt | None = None
    """Prompts of one update of the student in stage adversarial; empty means all of a step, and then no ratio is
    ever clipped."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of the divergence from the student that the adversarial stage began with; 0 leaves it out."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The policy's ratio counts from 1 - clip_range to 1 + clip_range (PPO, arXiv 1707.06347)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio where the advantage is negative (arXiv 1912.09729); empty leaves it out."""


class RolloutConfig(Section):
    """How gad lets the student answer."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers: in the training's own processes, with its weights; vllm: a server that takes the weights each step."""
    batching: Literal["static", "continuous"] = "static"
    """transformers: static keeps a batch in one cache, a prompt computed once for all of its answers; continuous is
    transformers' own continuous batching, in pages."""
    num_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt."""
    temperature: PositiveFloat = 0.8
    """Sampling temperature; the policy's probabilities are taken at it too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens of this share."""
    batch_size: PositiveInt = 64
    """Answers that one rank writes at once."""
    tensor_parallel: PositiveInt = 1
    """vllm: GPUs that one copy of the student is spread over."""
    memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """vllm: share of a GPU's memory."""
    url: str | None = None
    """vllm: a server that runs already, such as http://127.0.0.1:8000; empty means one is started."""


class OptimConfig(Section):
    """The optimiser. Muon takes the blocks' matrices and AdamW the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices with adamw for embeddings, head and norms."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate of AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; vectors have none."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: Share = 0.95
    """Nesterov momentum of Muon."""
    muon_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of Muon's matrices."""


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor of its peak."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: warm-up, stable, then a decay over the last decay_ratio of the run."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the run that warms up; an alternative to warmup_steps."""
    min_lr_ratio: Share = 0.1
    """Factor at the last step of cosine, linear and wsd."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run over which wsd decays."""
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    """How wsd decays: linear, or 1 - sqrt(progress)."""


class EngineConfig(Section):
    """How the work is spread over processes."""

    name: Literal["auto", "single", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """auto: single on one process, ddp on several; fsdp: weights, gradients and optimiser state are sharded; zero2,
    zero3: DeepSpeed's, gradients and optimiser state sharded, or weights too."""
    sharding: Literal["full", "hybrid"] = "full"
    """fsdp over all ranks, or hybrid: over groups of shard_ranks ranks that hold the same shards."""
    shard_ranks: PositiveInt | None = None
    """Ranks that a model is sharded over under hybrid; empty means those of one machine."""
    reshard_after_forward: bool = True
    """fsdp frees a block's weights after its forward pass and gathers them again for the backward pass; off: faster,
    and all weights are held from forward to backward."""
    cpu_offload: Literal["none", "optimizer", "all"] = "none"
    """What the memory of the CPU holds: the optimiser's state (zero2, zero3), or shards of the weights too (fsdp,
    zero3)."""
    ds_config: str | None = None
    """A DeepSpeed configuration of your own (JSON) for zero2 and zero3; it may add to the generated one, and is
    refused where it contradicts another setting."""
    nproc: PositiveInt | Literal["auto"] = "auto"
    """Processes on this machine; auto: one per GPU."""
    gpus: tuple[NonNegativeInt, ...] = ()
    """GPUs of this machine to use, by number; empty means all that CUDA_VISIBLE_DEVICES shows."""
    timeout_s: PositiveInt = 600
    """A collective operation that takes longer ends the run."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    save_every: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    save_each_epoch: bool = False
    """Save at the end of each epoch too."""
    async_save: bool = False
    """Training goes on while a checkpoint's files are written; needs memory of the CPU for a copy of the state."""
    keep_last: PositiveInt = 3
    """Newest checkpoints kept, beside the best one."""


class EvalConfig(Section):
    """Validation during training."""

    every: PositiveInt = 250
    """Steps between evaluations; the last step is always evaluated."""
    max_tokens: PositiveInt | None = 1_000_000
    """Tokens of the validation split that one evaluation reads: the same rows each time, spread evenly over the
    split; empty means all."""
    prompts: tuple[str, ...] = ()
    """Prompts continued at each evaluation, into samples.jsonl; empty means openings of validation documents."""
    num_samples: NonNegativeInt = 3
    """How many openings of validation documents are continued when there are no prompts."""
    max_new_tokens: PositiveInt = 64
    """Length of a sample, in tokens."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    num_prompts: PositiveInt = 600
    """gad: prompts of the validation split that are answered at each evaluation, spread evenly over it."""
    after_training: bool = True
    """After the last step, answer the prompts once more with the best checkpoint; off: the run ends at once."""


class TrackingConfig(Section):
    """Where metrics go, beside metrics.jsonl, which is always written."""

    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Trackers to write to, several at once. Their own variables (WANDB_*, MLFLOW_*, TRACKIO_*) say where they are."""
    project: str | None = None
    """Project of Weights & Biases and Trackio, experiment of MLflow; empty means what their variables say, else
    trainway."""
    run_name: str | None = None
    """Name of the run at the trackers; empty means that of its directory."""
    group: str | None = None
    """Group of runs that this one belongs to."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    wait_s: NonNegativeFloat = 30
    """How long the end of a run waits until its trackers hold everything; `trainway runs sync` sends what is left."""


class LogConfig(Section):
    """What the log shows."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message shown."""
    every: PositiveInt = 10
    """Steps between progress lines when the output is not a terminal."""
    batches: Literal["all", "first-last", "none"] = "first-last"
    """Which micro-batches of a step get a line of their own at level debug."""


class WatchdogConfig(Section):
    """What ends a run that stands still, and warns of one that is slow."""

    enabled: bool = True
    """Watch the run: every rank tells the others what it is in."""
    stall_s: PositiveFloat = 480
    """A rank that does not get on for so long ends the run and is named, with its stack. Below engine.timeout_s, whose
    error names nobody."""
    long_stall_s: PositiveFloat = 1800
    """The same for what may take long: loading, the first step, validation, samples, rollouts, checkpoints."""
    throughput_drop: Share = 0.5
    """Warn when the recent tokens per second are lower than the run's own median by more than this share; 0: never."""
    min_gpu_utilization: Share = 0.3
    """Warn when a rank's GPU works for less than this share of ten minutes; 0: never."""


class ReleaseConfig(Section):
    """What leaves for the Hugging Face Hub when the run is done, by itself or by `trainway release`."""

    push_to_hub: bool = False
    """After the last step, upload the model and tag it; that it can be done is checked before the training starts."""
    repo: RepositoryName | None = None
    """Where to: OWNER/NAME. It is made when it is not there."""
    tag: TagName = "v0.1"
    """Tag of the release; it is set last, when everything else is there."""
    private: bool = True
    """Make a private repository; off: everyone may read it."""
    which: Literal["best", "latest"] | NonNegativeInt = "best"
    """The checkpoint to release: best, latest, or a step. Without an evaluation the latest is the best."""
    merge: bool = False
    """lora: release one plain model, the adapter merged into its base."""
    licence: LicenceName | None = None
    """The model's licence, as the Hub names it, such as apache-2.0; empty means the card names none."""
    base: ModelName | None = None
    """Hub id of the model that the training started from, for the card, where model.path is a local directory."""


class RunConfig(Section):
    """One run, from data to exported model."""

    recipe: Literal["pretrain", "sft", "gad"] = "pretrain"
    """What is trained, and on what. pretrain: every token of documents; sft: the answers in conversations; gad: a
    student on a teacher's answers, against a discriminator."""
    description: str = ""
    """One sentence for people."""
    name: str | None = None
    """Name of the run; empty means model, method, settings and time."""
    runs_dir: str = "runs"
    """Directory in which run directories are made."""
    run_dir: str | None = None
    """The run directory itself; empty means runs_dir/name."""
    seed: NonNegativeInt = 42
    """Seed of everything random: initial weights, order of rows, dropout, samples."""
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    gad: GadConfig = GadConfig()
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    release: ReleaseConfig = ReleaseConfig()


class ShardConfig(Section):
    """What `trainway data shard` reads and how it writes shards; no part of a run."""

    mode: Literal["smoke", "prod", "split"] = "prod"
    """smoke: the first `take` documents; prod: all; split: all, each to training or validation."""
    inputs: tuple[str, ...] = ()
    """Files, directories or patterns to read; an alternative to dataset."""
    dataset: str | None = None
    """A Hugging Face dataset: a Hub id, a directory of data files, or the path or URL of one."""
    subset: str | None = None
    """Subset (configuration) of the dataset."""
    revision: str | None = None
    """Commit, tag or branch of a dataset on the Hub; empty means the newest, kept when a run goes on."""
    split: str = "train"
    """Split of the dataset, or slices of it: train[:1%]."""
    text_field: str = "text"
    """Field or column that holds the text."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What one document is in a plain text file."""
    format: Literal["text", "jsonl"] = "text"
    """text: one document a line, its line breaks become spaces; jsonl: {"text": ...}, nothing is lost."""
    gzip: bool = False
    """Compress the shards."""
    lines_per_shard: PositiveInt = 50000
    """Documents in a shard."""
    take: PositiveInt = 100000
    """Documents that mode smoke takes."""
    val_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Probability of a document to go to validation in mode split."""
    out: str
    """Directory of the shards, of training in mode split."""
    val_out: str | None = None
    """Directory of the validation shards in mode split; empty means beside out: train → val, NAME → NAME-val."""
    seed: NonNegativeInt = 42
    """Decides, with a document's text, on which side of the split it falls."""
    on_bad_record: Literal["error", "quarantine"] = "error"
    """A malformed record ends the sharding, or is set aside in quarantine.jsonl and counted."""
    max_document_mib: PositiveInt = 64
    """A longer document counts as malformed."""
