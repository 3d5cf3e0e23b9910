"""Start vLLM for what is in a directory: a whole model, or an adapter together with the base that it names.

Usage: serve.py MODEL [vLLM's own options]. MODEL is a directory, or a model of the Hub. Listens on 0.0.0.0:8000 with
the key in $VLLM_API_KEY; without a key on 127.0.0.1 alone. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ADAPTER = "adapter_config.json"
NAME = "model"
"""What clients ask for."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM makes room for."""


def command(model: str, options: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line of vLLM. Raises SystemExit with a reason when MODEL cannot be served."""
    host = "0.0.0.0" if environ.get("VLLM_API_KEY") else "127.0.0.1"
    own = ["--host", host, "--port", environ.get("PORT", "8000")]
    folder = Path(model)
    if not (folder / ADAPTER).is_file():
        return ["vllm", "serve", model, *own, "--served-model-name", NAME, *options]
    adapter = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    base, rank = adapter.get("base_model_name_or_path"), int(adapter.get("r") or 0)
    rank = max([rank, *(int(value) for value in (adapter.get("rank_pattern") or {}).values())])
    room = next((size for size in RANKS if size >= rank), None)
    if not base or room is None:
        raise SystemExit(f"error: {folder / ADAPTER} names no base model, or a rank above {RANKS[-1]}")
    module = json.dumps({"name": NAME, "path": model, "base_model_name": base})
    adapters = ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", module]
    return ["vllm", "serve", base, *own, *adapters, *options]


def main(arguments: Sequence[str]) -> None:
    """Become vLLM: signals reach it directly."""
    words = list(arguments) or [word for word in [os.environ.get("MODEL", "")] if word]
    if not words or words[0].startswith("-"):
        raise SystemExit("usage: serve.py MODEL [vLLM's own options], or MODEL in the environment")
    line = command(words[0], words[1:], os.environ)
    if "127.0.0.1" in line:
        print("note: VLLM_API_KEY is not set, so only this container itself is answered", file=sys.stderr)
    os.execvp(line[0], line)


if __name__ == "__main__":
    main(sys.argv[1:])
