"""The configuration of a model to start from: read without running anybody's code, and that of a causal language model."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from trainway.errors import ConfigError, DataError
from trainway.files import read_json
from trainway.models.base_files import CONFIG
from trainway.models.base_hub import COMMIT
from trainway.models.base_import import quiet_transformers

_CAUSAL = re.compile(r"For\w*CausalLM$|LMHeadModel$|LMHead$")


def check_trust(path: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises ConfigError when the code of a model on the Hub may run and no commit of it is named."""
    if trust_remote_code and not (revision and COMMIT.fullmatch(revision)):
        raise ConfigError(
            "model.trust_remote_code needs a model.revision of 40 hexadecimal digits",
            f"the code of {path} runs with your rights, and a branch or tag may hold other code tomorrow",
            "read the code of one commit on the model's page, and name that commit",
        )


def read_config(directory: Path, source: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, str]:
    """The configuration of a model directory, and a note about the repository's own code, if it has any.

    Raises:
        ConfigError: an unknown family, no causal language model, or code that is not trusted.
        DataError: config.json is damaged.
    """
    content = read_json(directory / CONFIG)
    if not isinstance(content, dict):
        raise DataError(f"{directory / CONFIG}: not a JSON object", fix="restore it, or download it anew")
    note = _check_code(content, source, trust_remote_code)
    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING and not (trust_remote_code and content.get("auto_map")):
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=3)
        raise ConfigError(
            f"{source}: the model type {kind!r} is unknown to transformers {transformers.__version__}"
            if kind else f"{source}: its config.json names no model_type",
            f"near it are {', '.join(near)}" if near else "no family of that name is implemented",
            "use a newer transformers, or another model",
        )  # fmt: skip
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                directory, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # of any kind: it depends on the family
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{source}: its config.json cannot be used", why, "correct it, or download it anew"
        ) from error
    _check_causal(config, content, source, trust_remote_code)
    return config, note


def _check_code(content: dict[str, Any], source: str, trust_remote_code: bool) -> str:
    code = content.get("auto_map")
    code = code if isinstance(code, dict) else {}
    own = [str(code[key]) for key in ("AutoConfig", "AutoModelForCausalLM") if key in code]
    if not own:
        return ""
    if not trust_remote_code:
        if content.get("model_type") in CONFIG_MAPPING:
            return f"the Python code of {source} is not run: transformers' own of {content['model_type']} is used"
        raise ConfigError(
            f"{source} needs Python code of its own ({', '.join(own)})",
            "Trainway runs no code of a model's repository unless you say so",
            "read that code; then set model.trust_remote_code=true and model.revision to the commit that you read",
        )
    elsewhere = [name for name in own if "--" in name]
    if elsewhere:
        raise ConfigError(
            f"{source} takes its Python code from another repository ({', '.join(elsewhere)})",
            "no commit of that one is named, so what runs may change",
            "copy the model and that code into one local directory, and correct auto_map in its config.json",
        )
    return f"the Python code of {source} is run ({', '.join(own)})"


def _check_causal(
    config: PreTrainedConfig, content: dict[str, Any], source: str, trust_remote_code: bool
) -> None:
    architecture = next(iter(content.get("architectures") or ()), None)
    named = architecture or config.model_type
    if config.get_text_config() is not config or config.is_encoder_decoder:
        kind = (
            "takes an encoder's states" if config.is_encoder_decoder else "holds a language model and others"
        )
        raise ConfigError(
            f"{source} is a {named}, not a plain causal language model",
            f"it {kind}",
            "name a text-only model",
        )
    own = trust_remote_code and "AutoModelForCausalLM" in (content.get("auto_map") or {})
    if own:
        return
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (
        architecture and not _CAUSAL.search(str(architecture))
    ):
        raise ConfigError(
            f"{source} is a {named}, not a causal language model",
            "it has no head that predicts the next token",
            "name a model whose architecture ends in ForCausalLM",
        )
