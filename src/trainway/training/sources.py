"""What a run reads: its sources in the log before the first step, and how far each has been read in the metrics."""

from __future__ import annotations

from trainway.data.mix import describe_mix, epochs_by_source, repeated_sources
from trainway.logs import stage, warn
from trainway.training.session import Session


def describe_sources(session: Session) -> None:
    """Log what is trained on, one line for each source of a mix; warn of sources that come too often."""
    prepared, store = session.prepared, session.store
    train, val = store.split("train"), store.split("val")
    stage(
        "DATA",
        f"{train.num_documents:,} documents of {train.num_tokens:,} tokens; validation {val.num_tokens:,}",
    )
    for name in prepared.absent:
        stage("DATA", f"the optional source {name} is absent: left out")
    if prepared.mix is not None:
        streams, rows = store.streams(), session.total_steps * session.geometry.global_batch_size
        documents = [stream.num_documents for stream in streams]
        for line in describe_mix(prepared.mix, documents, [stream.num_tokens for stream in streams], rows):
            stage("DATA", line)
        if session.world.is_main:
            for line in repeated_sources(prepared.mix, rows):
                warn(line)


def source_metrics(session: Session, step: int) -> dict[str, float]:
    """`data/epoch/NAME` for each source of a mix: how often it has been read by the end of `step`."""
    mix = session.prepared.mix
    if mix is None:
        return {}
    epochs = epochs_by_source(mix, step * session.geometry.global_batch_size)
    return {f"data/epoch/{name}": value for name, value in epochs.items()}
