"""The discriminator: a language model's body with a scalar head, its first weights, adapters, scores and their gradient."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainway.checkpoint.pieces import Piece
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError
from trainway.models.attention import use_packed_attention
from trainway.models.attention_choice import use_attention
from trainway.models.base import BaseModel, experts_on, meta_model, restore_buffers
from trainway.models.body import last_hidden
from trainway.models.load import InitialWeights
from trainway.models.lora import Landed, inject_lora

HEAD = "score"
"""transformers' name of the linear layer [1, H] that makes a score of a hidden state."""

_USUAL_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>")
_SPARE = ("pad", "reserved", "unused", "placeholder")


# ---- the model


def build_discriminator(
    base: BaseModel, *, dtype: torch.dtype, device: torch.device | str = "cpu", pad_id: int | None = None
) -> PreTrainedModel:
    """transformers' sequence classifier of the base's family with one label, on the meta device as `build_base`.

    Every parameter of the body is of type `dtype`, the head of at least fp32; buffers are real. pad_id: by which
    others find the last token of a padded sequence: see `scoring_tokenizer`.

    Raises:
        ConfigError: transformers has no such class for this family.
    """
    config = copy.deepcopy(base.config)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise _no_class(base, "transformers has no sequence classifier for it")
    config.num_labels = 1
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    model = meta_model(config, dtype, experts=experts_on(torch.device(device)))
    body = f"{model.base_model_prefix}."
    others = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    if others != [f"{HEAD}.weight"]:
        raise _no_class(base, f"that of transformers has {', '.join(others)} beside its body")
    head = model.get_submodule(HEAD).weight
    head.data = head.data.to(torch.promote_types(dtype, torch.float32))
    restore_buffers(model, base)
    # after the embedding is made, which would keep the row of a padding token as it is for ever
    model.config.pad_token_id = pad_id
    return model.eval()


def use_discriminator_attention(
    model: PreTrainedModel, base: BaseModel, name: str, packed: bool, device: torch.device | str | None = None
) -> str:
    """Install the attention that `use_attention` finds for the causal model of `base`; they have the same body.

    Raises ConfigError and EnvironmentFault as that.
    """
    causal = meta_model(base.config, torch.float32, base.trust_remote_code)
    found = use_attention(causal, name, packed, device)
    if found == "packed":
        use_packed_attention(model)
    else:
        model.set_attn_implementation(found)
    return found


def adapt_discriminator(
    model: PreTrainedModel, lora: LoraConfig, base: str | None = None, revision: str | None = None
) -> Landed:
    """Put the student's kind of adapters into the body, and train the head whole; arguments as `inject_lora`'s.

    Of the modules that are trained whole in the student those are left out that it does not have: the output head.
    """
    names = [name for name, _ in model.named_modules()]
    kept = [
        wanted for wanted in lora.modules_to_save
        if wanted != HEAD and any(name == wanted or name.endswith(f".{wanted}") for name in names)
    ]  # fmt: skip
    lora = lora.model_copy(update={"modules_to_save": (*kept, HEAD)})
    return inject_lora(model, lora, base, revision, task="SEQ_CLS")


@dataclass(frozen=True)
class DiscriminatorWeights:
    """The base's weights for the body, and for the head normal(0, std): a function of `seed` and its shape alone.

    With adapters: `AdaptedWeights(DiscriminatorWeights(...), seed)`.
    """

    base: InitialWeights
    """Knows the weights of the body by their names in the causal model, which are the same."""
    seed: int
    std: float = 0.02

    @classmethod
    def of(cls, base: InitialWeights, model: PreTrainedModel, seed: int) -> DiscriminatorWeights:
        """With the std that the family begins its matrices with."""
        return cls(base, seed, float(getattr(model.config, "initializer_range", None) or cls.std))

    @torch.no_grad()
    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        self.base(self._body_pieces(pieces))

    def _body_pieces(self, pieces: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, Piece]]:
        """Fills the head on the way, and hands the rest on: pieces are taken one at a time."""
        for name, piece in pieces:
            if name != f"{HEAD}.weight":
                yield name, piece
                continue
            generator = torch.Generator().manual_seed(self.seed)
            piece.copy_from(torch.empty(piece.shape).normal_(0.0, self.std, generator=generator))


# ---- the scores


class DiscriminatorLoss(nn.Module):
    """A discriminator and its loss as one module, as `CausalLMLoss` is for the student.

    The gradient of any loss of scores comes in two passes: 1) scores without gradient 2) the loss's gradient by the
    scores, over all ranks 3) backward from the sum of scores with these as coefficients, micro-batch by micro-batch.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        boundaries: tuple[int, ...] | None,
        last: Tensor,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """The scores of the sequences in a micro-batch, [S] fp32; with coefficients sum(coefficients * scores), 0-d.

        input_ids, position_ids [B, T], boundaries: as `CausalLMLoss`. last: int64 [S], the flattened position of each
        sequence's last token, known by its length: a token of padding may be one of the text. coefficients [S].

        A rank without a sequence gives an empty `last`, and no row if it has none: all parameters are used, and have
        gradients of zero.
        """
        if not input_ids.numel():
            input_ids, boundaries = input_ids.new_zeros(1, 1), (0, 1)
            position_ids = torch.zeros_like(input_ids)
        hidden = last_hidden(self.model, input_ids, position_ids, boundaries).flatten(0, 1)  # [B * T, H]
        scores = self._scores(hidden.index_select(0, last))
        return scores if coefficients is None else (coefficients * scores).sum()

    def _scores(self, hidden: Tensor) -> Tensor:
        """[S] of [S, H]; in fp32 under autocast too: near 12 the numbers of bf16 are 0.0625 apart."""
        weight = self.model.get_submodule(HEAD).weight  # [1, H]
        kind = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.to(kind) @ weight.to(kind).T).squeeze(-1)


# ---- for those who load it


def scoring_tokenizer(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()
) -> PreTrainedTokenizerBase:
    """A copy to save with a discriminator, whose padding token is none that a sequence ends with.

    transformers takes the last token that is not padding for a sequence's last: where padding is the end token too, it
    would read the score one token early. Without a token to spare the copy has none, and one text at a time is scored.

    Args:
        ends: ids that sequences end with, beside the tokenizer's own end.
    """
    result = copy.deepcopy(tokenizer)
    last = {*ends, tokenizer.eos_token_id}
    known = tokenizer.get_vocab()
    spare = [
        token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and any(part in token.content.lower() for part in _SPARE)
    ]  # fmt: skip
    # no answer ends with what marks the start of a text, or with what no text is made into
    names = (tokenizer.pad_token, *_USUAL_PADS, *spare, tokenizer.unk_token, tokenizer.bos_token)
    result.pad_token = next((name for name in names if name in known and known[name] not in last), None)
    return result


def _no_class(base: BaseModel, why: str) -> ConfigError:
    return ConfigError(
        f"{base.source}: a {base.config.model_type} cannot be a discriminator",
        why,
        "set gad.discriminator to a model of another family with the same tokenizer",
    )
