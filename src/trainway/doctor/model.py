"""The model that training starts from: every file is there, whether from a directory or from the Hub's cache (R36)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainway.config.schema import RunConfig
from trainway.doctor.findings import Finding, Subject, failure, fault, gib, ok
from trainway.doctor.needs import hub_model
from trainway.errors import UserError


def check_model(subject: Subject, config: RunConfig) -> Iterator[Finding]:
    """The files of a local directory; those of a model on the Hub only where no network may be asked.

    Imports torch: what knows the files is the code that reads them.
    """
    if config.model.path is None:
        return
    needs_tokenizer = config.tokenizer.path is None
    name = hub_model(config)
    if name is not None and not subject.offline:
        return
    try:
        from trainway.models.base_files import find_local, read_directory
        from trainway.models.base_hub import fetch_model
    except ModuleNotFoundError as error:
        yield failure(
            "model-files",
            f"the files of {config.model.path} could not be looked at",
            str(error),
            "install what the check `torch` and the check `libraries` name, and start the doctor again",
        )
        return
    try:
        if name is not None:
            place = fetch_model(
                name,
                config.model.revision,
                with_code=config.model.trust_remote_code,
                needs_tokenizer=needs_tokenizer,
                report=lambda label, done, total: None,
            ).directory
        else:
            place = find_local(config.model.path) or Path(config.model.path)
        files = read_directory(place, config.model.path, needs_tokenizer=needs_tokenizer)
    except UserError as error:
        yield fault("model-files", error)
        return
    count = len(files.weights)
    yield ok(
        "model-files",
        f"{config.model.path}: {count} weight file{'s' * (count > 1)}, {gib(files.num_bytes)}, all whole",
    )
