"""The training state survives exactly, and anything else is refused."""

import dataclasses
import json
import math

import pytest

from trainway.checkpoint.state import TrainState
from trainway.errors import DataError

STATE = TrainState(
    step=7,
    tokens_seen=2**40,
    samples_seen=56,
    best_val_loss=0.1 + 0.2,
    best_step=5,
    last_val_loss=1 / 3,
    skipped_steps=1,
    guard={"norms": [0.1, 5e-324], "run": 2},
    scaler={"scale": 65536.0},
    elapsed_s=1e-17,
    config_hash="c" * 32,
    data_hash="d" * 32,
    tokenizer_hash="t" * 32,
    base_hash="",
)


def test_round_trip_is_exact():
    assert TrainState.from_json(STATE.to_json()) == STATE


def test_optional_values_may_be_none_and_a_loss_may_be_nan():
    state = dataclasses.replace(STATE, best_val_loss=None, best_step=None, last_val_loss=math.nan)
    back = TrainState.from_json(state.to_json())
    assert back.best_val_loss is None and back.best_step is None
    assert back.last_val_loss is not None and math.isnan(back.last_val_loss)


def test_the_module_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, trainway.checkpoint.state, trainway.checkpoint.store, trainway.checkpoint.lock,"
        " trainway.provenance, trainway.training.shutdown; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _changed(**changes):
    return json.dumps({**json.loads(STATE.to_json()), **changes})


def _without(name):
    fields = json.loads(STATE.to_json())
    del fields[name]
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        (_changed(format=2), "format 2"),
        (_changed(rng="x"), "unknown fields: rng"),
        (_without("guard"), "missing fields: guard"),
        (_changed(step="7"), "field step"),
        (_changed(step=-1), "field step"),
        (_changed(step=True), "field step"),
        (_changed(step=None), "field step"),
        (_changed(elapsed_s="1"), "field elapsed_s"),
        (_changed(guard=[]), "field guard"),
        (_changed(config_hash=None), "field config_hash"),
    ],
)
def test_what_is_not_a_state_is_refused(text, reason):
    with pytest.raises(DataError) as caught:
        TrainState.from_json(text, "step-7/state.json")
    assert "step-7/state.json" in caught.value.what
    assert reason in caught.value.why
