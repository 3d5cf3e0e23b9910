"""The report of one run, or of several beside each other: a single HTML file that needs nothing but a browser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway import __version__
from trainway.errors import ConfigError
from trainway.files import atomic_write
from trainway.logs import stage, warn
from trainway.report import sections
from trainway.report.beside import differences, last_answers, results
from trainway.report.facts import RunFacts, read_run
from trainway.report.html import STATIC, content_policy, json_for_page, render, static_text
from trainway.report.panels import draw_panels
from trainway.report.wording import day
from trainway.run_dir import RunDir

MOST_POINTS = 2000
"""Of a metric of a single run: about two a pixel of the widest chart."""
FEWEST_POINTS = 300
"""Of a metric of each of many runs."""
BESIDE = "comparison.html"
END_BYTES = 20 << 20
"""Of a metrics.jsonl that a run's end may read: about a second's work. A longer one is left to `trainway report`."""
SCRIPTS = (*(name for name in STATIC if name.endswith(".js")), "report.js")
STYLES = tuple(name for name in STATIC if name.endswith(".css"))


@dataclass(frozen=True)
class Written:
    """A report on the disk."""

    path: Path
    bytes: int
    runs: tuple[RunFacts, ...]


def write_report(runs: Sequence[Path], out: Path | None = None) -> Written:
    """Write the report of one run, or of several beside each other, complete or not at all.

    Args:
        out: empty means report.html in the directory of a single run, else comparison.html in the working directory.

    Raises:
        ConfigError: one of `runs` is no run directory, or is given twice.
        EnvironmentFault: the file cannot be written.
    """
    if len({path.resolve() for path in runs}) < len(runs):
        raise ConfigError("a run is given twice", "a run does not differ from itself", "name each run once")
    most_points = max(FEWEST_POINTS, MOST_POINTS // len(runs))
    found = tuple(read_run(path, most_points) for path in runs)
    path = out or (found[0].run.report_page if len(found) == 1 else Path(BESIDE))
    page = (one_run(found[0]) if len(found) == 1 else several_runs(found)).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    return Written(path, len(page), found)


def write_at_end(run: RunDir) -> None:
    """Write the report of a run that has just ended. It never fails a run, and leaves a long one to the verb."""
    try:
        if run.metrics.stat().st_size > END_BYTES:
            stage("DONE", f"its report: trainway report {run.path}")
            return
        write_report([run.path])
    except Exception as error:  # the run is done and saved, whatever is wrong with its picture
        warn(f"report.html is not written: {type(error).__name__}: {error}")


def one_run(run: RunFacts) -> str:
    """The page of a run."""
    return _page(
        title=run.name,
        state=run.state,
        about=sections.about(run),
        notices=sections.notices(run),
        cards=sections.cards(run),
        charts=draw_panels([run.series.columns()], [run.name], sections.marks(run)),
        memory=sections.memory(run),
        warned=sections.warned(run),
        asked=sections.asked(run),
        data=sections.data(run),
        checkpoints=sections.checkpoints(run),
        settings=sections.settings(run),
        environment=sections.environment(run),
    )


def several_runs(runs: Sequence[RunFacts]) -> str:
    """The page of several runs: what differs, their results, and their charts laid over each other."""
    names = _names(runs)
    return _page(
        title=f"{len(runs)} runs",
        about=names,
        results=results(runs, names),
        differences=differences(runs, names),
        toggles=names,
        charts=draw_panels([run.series.columns() for run in runs], names, {}),
        asked=last_answers(runs, names),
    )


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """As short as tells them apart: two directories may bear the same name."""
    for parts in (1, 2):
        names = ["/".join(run.run.path.resolve().parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.run.path) for run in runs]


_EMPTY: dict[str, Any] = dict.fromkeys(
    ("state", "about", "notices", "cards", "results", "differences", "toggles", "memory", "warned", "asked", "data",
     "checkpoints", "settings", "environment"), ()
)  # fmt: skip


def _page(*, title: str, charts: dict[str, Any], **parts: Any) -> str:
    from markupsafe import Markup

    scripts, styles = [static_text(name) for name in SCRIPTS], [static_text(name) for name in STYLES]
    values = {**_EMPTY, **parts}
    states = ("new", "running", "stopped", "failed", "done", "killed")
    return render(
        "report.html.j2",
        title=title,
        state_class=values["state"] if values["state"] in states else "",
        sections={chart["section"] for chart in charts["charts"]},
        # ours, and JSON in which no tag can end: nothing else on the page goes in unescaped
        scripts=[Markup(script) for script in scripts],
        styles=[Markup(style) for style in styles],
        charts_json=Markup(json_for_page(charts)),
        policy=content_policy(scripts, styles),
        written=day(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
        version=__version__,
        **values,
    )
