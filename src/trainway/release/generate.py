"""Text from a trained model: loaded once, asked by token ids, answered token by token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from trainway.checkpoint.adapter import is_adapter
from trainway.checkpoint.weights import is_in_pieces, load_model
from trainway.data.chat_marks import Renderer
from trainway.data.chat_template import conversation
from trainway.data.chat_tokens import adds_bos
from trainway.data.rows import MalformedError
from trainway.data.teacher import own_template
from trainway.data.tokenise import has_bos
from trainway.errors import ConfigError
from trainway.models.base_import import quiet_transformers
from trainway.release.bundle import adapter_base, model_directory, run_config
from trainway.release.endings import known_ends
from trainway.release.text_stream import TextStream

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn, and where it ends."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this much probability together (nucleus sampling)."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 means all."""
    seed: int = 42
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""


@dataclass(frozen=True)
class Answer:
    """A finished continuation."""

    text: str
    finish: Literal["stop", "length"]
    """It came to its end, or to the last token that it was allowed."""
    prompt_tokens: int
    completion_tokens: int


def generate_text(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 42,
    chat: bool = False,
) -> str:
    """Continue a prompt with the model of a run, a checkpoint or a model directory; greedy at temperature 0.

    chat: the prompt is a user's turn, to be answered.

    Raises:
        ConfigError: no model there, or no chat template in it.
    """
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return generate_answer(model, prompt, decoding, chat=chat).text


def generate_answer(
    model: str | Path, prompt: str, decoding: Decoding, *, chat: bool = False, dtype: Dtype = "float32"
) -> Answer:
    """As `generate_text`, with how it ended and the number of tokens."""
    speaker = load_speaker(model, dtype)
    ids = speaker.chat([{"role": "user", "content": prompt}]) if chat else speaker.raw(prompt)
    return speaker.answer(ids, decoding)


def load_speaker(target: str | Path, dtype: Dtype = "float32") -> Speaker:
    """The model of a run (its best checkpoint), a checkpoint or a model directory, on the GPU if there is one.

    Raises:
        ConfigError: no model there, or the base of an adapter was not found.
        DataError: it is damaged.
    """
    directory = model_directory(target)
    model, tokenizer = load_causal_lm(directory, getattr(torch, dtype))
    if torch.cuda.is_available():
        model.to("cuda")
    config = run_config(directory)
    # the documents of a pretraining begin with the start token, whatever the tokenizer does by itself
    pretrained = config is not None and config.recipe == "pretrain"
    begins = has_bos(tokenizer) if pretrained else adds_bos(tokenizer)
    return Speaker(model.eval(), tokenizer, begins_with_bos=begins)


class Speaker:
    """A loaded model and its tokenizer; answers one request at a time, others wait.

    begins_with_bos: whether plain texts do, as they did in training.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, begins_with_bos: bool
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._bos = [tokenizer.bos_token_id] if begins_with_bos else []
        template = own_template(tokenizer)
        self._renderer = Renderer(template) if template else None
        self.ends = _ends(model, known_ends(tokenizer))
        """Tokens after which there is nothing more to say."""
        self.context: int = getattr(model.config, "max_position_embeddings", None) or 2**31
        """Tokens of a prompt and its answer."""
        self._turn = threading.Lock()

    @property
    def can_chat(self) -> bool:
        """Whether it has a chat template."""
        return self._renderer is not None

    def raw(self, text: str) -> list[int]:
        """A text to go on with, as a document starts."""
        ids = self._bos + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids or [self.tokenizer.eos_token_id]

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A conversation whose next turn is the assistant's, by the chat template.

        Raises ConfigError without a template, or where it refuses the conversation.
        """
        if self._renderer is None:
            raise ConfigError(
                "the model has no chat template",
                "it was trained to continue text, not to answer",
                "use `trainway generate`, or the completions of a server",
            )
        try:
            text = self._renderer.render(conversation(messages), None, prompt=True)
        except MalformedError as error:
            raise ConfigError(
                "the conversation cannot be rendered", error.reason, "see the model's chat template"
            ) from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, ids: Sequence[int], decoding: Decoding) -> Answer:
        """The whole continuation of `ids`. Raises ConfigError when they leave no room."""
        (*_, last) = self.stream(ids, decoding)
        assert isinstance(last, Answer)
        return last

    def stream(self, ids: Sequence[int], decoding: Decoding) -> Generator[str | Answer, None, None]:
        """Pieces of text as they come, then the answer that they make up; to close it early ends the generation.

        The same ids and decoding give the same text, alone and after whatever was asked before.

        Raises ConfigError when `ids` leave no room.
        """
        if len(ids) >= self.context:
            raise ConfigError(
                f"the prompt has {len(ids):,} tokens",
                f"the model takes {self.context:,}, the answer's included",
                "shorten it",
            )
        budget = min(decoding.max_new_tokens, self.context - len(ids))
        written = TextStream(self.tokenizer, decoding.stop)
        text, count, ended = "", 0, False
        with ExitStack() as stack:
            tokens = self._tokens(ids, budget, decoding)
            stack.callback(tokens.close)
            for token in tokens:
                count += 1
                ended = token in self.ends
                piece = "" if ended else written.push(token)
                if piece:
                    text += piece
                    yield piece
                if ended or written.stopped:
                    break
        if piece := written.flush():
            text += piece
            yield piece
        finish: Literal["stop", "length"] = "stop" if ended or written.stopped else "length"
        yield Answer(text, finish, len(ids), count)

    def _tokens(self, ids: Sequence[int], budget: int, decoding: Decoding) -> Generator[int, None, None]:
        """The tokens of transformers' own `generate`, from a thread that ends when this is closed."""
        arrived: queue.Queue[int | BaseException | None] = queue.Queue()
        cancelled = threading.Event()

        def run() -> None:
            try:
                with self._turn:
                    if not cancelled.is_set():
                        self._generate(ids, budget, decoding, arrived, cancelled)
                arrived.put(None)
            except BaseException as error:  # raised where the tokens are read
                arrived.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (token := arrived.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            cancelled.set()
            thread.join()

    @torch.no_grad()
    def _generate(
        self,
        ids: Sequence[int],
        budget: int,
        decoding: Decoding,
        arrived: queue.Queue[int | BaseException | None],
        cancelled: threading.Event,
    ) -> None:
        device = self.model.get_input_embeddings().weight.device
        sampling: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                "top_k": decoding.top_k,
            }
        prompt = torch.tensor([list(ids)], device=device)  # [1, T]
        pad = self.tokenizer.pad_token_id
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), quiet_transformers():
            torch.manual_seed(decoding.seed)
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=budget,
                eos_token_id=list(self.ends),
                pad_token_id=pad if pad is not None else self.ends[0],
                streamer=_Arrivals(arrived),
                stopping_criteria=[_Until(cancelled)],
                **sampling,
            )


class _Until:
    """A stopping criterion of transformers: nobody reads on."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), device=input_ids.device)


class _Arrivals:
    """A streamer of transformers that hands tokens on."""

    def __init__(self, arrived: queue.Queue[int | BaseException | None]) -> None:
        self._arrived = arrived
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._arrived.put(token)

    def end(self) -> None:
        pass


def _ends(model: PreTrainedModel, known: Sequence[int]) -> tuple[int, ...]:
    """The tokenizer's ends, and those that the model names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = named if isinstance(named, list) else [named]
    return tuple(sorted({end for end in (*ends, *known) if end is not None}))


def load_causal_lm(
    directory: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in `dtype`, and the tokenizer of a local model directory, by plain transformers; one in pieces by us.

    An adapter comes with its base, which its configuration names.

    Raises:
        ConfigError: the base of an adapter was not found.
        DataError: a piece is missing or damaged.
    """
    disable_progress_bar()  # a local file is read in a moment
    if is_adapter(directory):
        from trainway.models.merge import load_adapted  # peft takes its time

        base = adapter_base(directory)
        home = directory if (directory / "tokenizer_config.json").exists() else base.directory
        tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
        return load_adapted(directory, base, dtype), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not is_in_pieces(directory):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        return model, tokenizer
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    load_model(model, directory)
    return model.eval(), tokenizer
