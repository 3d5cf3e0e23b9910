"""What is secret is known by its name or its form, and hidden; what only looks a little like it stays."""

from __future__ import annotations

import pytest

from trainway.masking import hide_secrets, holds_token, is_secret_variable, mask_secrets, secret_values


@pytest.mark.parametrize(
    "name",
    """HF_TOKEN HUGGING_FACE_HUB_TOKEN hf_token WANDB_API_KEY APIKEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID DB_PASSWORD
    DB_PASSWORD_2 SSH_PASSPHRASE GOOGLE_CREDENTIALS PROXY_AUTHORIZATION DEPLOY_KEY KEY MYTOKEN""".split(),
)
def test_a_variable_with_a_secret_s_name(name: str) -> None:
    assert is_secret_variable(name)


@pytest.mark.parametrize(
    "name",
    """MAX_TOKENS TOKENIZERS_PARALLELISM DB_PASSWORD_FILE GOOGLE_CREDENTIALS_PATH TOKEN_LIMIT SECRET_NAME PUBLIC_KEY
    NCCL_IB_PKEY KEYBOARD MONKEY PATH BOS_TOKEN_ID""".split(),
)
def test_a_variable_with_another_name(name: str) -> None:
    assert not is_secret_variable(name)


def test_a_token_is_known_where_it_is_a_word() -> None:
    assert holds_token("hf_0123456789abcdef") and holds_token("x=ghp_0123456789abcdef;")
    assert not holds_token("hf_token") and not holds_token(
        "a task-0123456789abcdef of a disk-0123456789abcdef"
    )


def test_values_of_the_environment_are_hidden_the_longest_first() -> None:
    environ = {
        "A_TOKEN": "canary-one",
        "B_TOKEN": "canary-one-and-more",
        "C_KEY": "short",
        "D_KEY": "/a/place/of/it",
    }
    values = secret_values(environ)
    assert values == ["canary-one-and-more", "canary-one"]
    text = "canary-one-and-more canary-one short /a/place/of/it hf_0123456789abcdef https://me:pw@host/"
    assert hide_secrets(text, values) == "*** *** short /a/place/of/it *** https://***@host/"


@pytest.mark.parametrize(
    "argv",
    [
        ["--hf-token", "canary"],
        ["--token=canary"],
        ["HF_TOKEN=canary"],
        ["tracking.wandb.api_key=canary"],
        ["--api-key=canary with spaces"],
        ["password=canary"],
        ["client_secret=canary"],
        ["aws_secret_access_key=canary"],
        ['{"token": "canary", "a": 1}'],
        ["env: {WANDB_API_KEY: canary}"],
        ["Authorization: Bearer canary"],
        ["https://user:canary@host/path"],
        ["hf_canarycanarycanary"],
        ["prefix sk-canarycanarycanary suffix"],
        ["-token", "canary"],
    ],
)
def test_secrets_are_masked(argv):
    assert "canary" not in " ".join(mask_secrets(argv))


def test_ordinary_settings_are_not_masked():
    argv = [
        "train", "eval.max_tokens=1000000", "train.loss_chunk_tokens=1024", "tokenizer.path=tok", "model.name=keyword",
        "--config", "a.yaml", "tokenizer.special_tokens=[<|x|>]", "https://host/path@v1", "data.text_field=monkey",
    ]  # fmt: skip
    assert mask_secrets(argv) == argv


def test_a_flag_without_a_value_masks_no_other_flag():
    assert mask_secrets(["--token", "--steps=3"]) == ["--token", "--steps=3"]
