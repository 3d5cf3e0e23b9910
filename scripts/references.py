"""Write the pages of docs/ that are made from the code: settings, job file, verbs, errors, the presets' plans.

python scripts/references.py [--check] [NAME ...]     --check only says which are out of date
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from pages import cli, config, job, plan, troubleshooting

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "config.md": config.render,
    "job.md": job.render,
    "cli.md": cli.render,
    "plan.md": plan.render,
    "troubleshooting.md": troubleshooting.render,
}
"""A page's name, and what makes its text from the one that stands."""


def main(arguments: list[str]) -> int:
    names = [word for word in arguments if word != "--check"] or list(PAGES)
    stale = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["TRAINWAY_HOME"] = home  # plans of this machine's measurements are not everybody's
        for name in names:
            page = DOCS / name
            before = page.read_text() if page.exists() else ""
            after = PAGES[name](before)
            if after != before:
                stale.append(name)
                if "--check" not in arguments:
                    page.write_text(after)
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}: run `python scripts/references.py`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
