"""docs/config.md: every setting of a configuration, from its schema."""

from __future__ import annotations

from typing import Any

from pages.tables import HEAD, default_of, row
from trainway.config.resolved import config_schema

OPENING = """# Configuration

This page is made from the schema by `python scripts/references.py`.

A configuration is a preset's name or a YAML or TOML file. Later layers win: defaults, then the preset that `extends` names,
the file itself, environment variables (`RUN_EXPERIMENT`, `TRAINWAY_RUNS_DIR`, `TRAINWAY_STORE_DIR`, `TRAIN_BACKEND`,
`PUSH_TO_HUB`, `RUN_EVALUATION`), `key=value` arguments.

```yaml
extends: m3_medium
data:
  train: [corpus/*.jsonl.gz]
train:
  total_steps: 5000
```

`trainway config check FILE` validates it, `trainway config show FILE` tells where each value came from. A key may be
given by its full name (`train.seq_len`), by its last part where that is unique (`seq_len`), or by the name that users of
Hugging Face's trainers, TRL, Axolotl and LLaMA-Factory know (`block_size`, `max_length`, `cutoff_len`). An unknown key is
an error that names the nearest one; so is a key that the run would ignore. A token is refused wherever settings stand:
set `HF_TOKEN` in the environment, or run `hf auth login`.

```bash
trainway train lora_default --model Qwen/Qwen2.5-3B-Instruct --data chats.jsonl --lora-r 8 --packing
trainway train gpt_oss_20b_full engine=fsdp train.seq_len=1024
trainway train gpt_oss_20b_lora --include_gpus 0,1 --no_evaluation
trainway train my.yaml 'lora.rank_pattern={"layers.7.self_attn.q_proj": 32}'
```

Any setting of `lora` turns it on; `lora=false` turns it off, whatever a preset or a file says below. A choice of engine
over a preset's takes what it can offload: `engine=fsdp` moves weights too where ZeRO-3 moved the optimiser's state alone.
"""


def render(page: str = "") -> str:
    schema = config_schema()
    sections = {
        "": schema,
        **{name: _resolve(schema, p) for name, p in schema["properties"].items() if _is_section(schema, p)},
    }
    parts = [OPENING]
    for name, section in sections.items():
        parts.append(f"\n## {name or 'The run'}\n\n{section.get('description', '').splitlines()[0]}\n")
        parts.append(HEAD)
        parts += [
            row(f"{name}.{key}".lstrip("."), default_of(value), value)
            for key, value in section["properties"].items()
            if not _is_section(schema, value)
        ]
    return "\n".join(parts) + "\n"


def _is_section(schema: dict[str, Any], value: dict[str, Any]) -> bool:
    return "$ref" in value and "properties" in _resolve(schema, value)


def _resolve(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = schema["$defs"][value["$ref"].rsplit("/", 1)[1]]
    return resolved
