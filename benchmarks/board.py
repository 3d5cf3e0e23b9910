"""What the board costs the machine it runs on: the server's own CPU time while 50 runs grow by a step a second each.

    python benchmarks/board.py                   # 60 s each: nobody looks, the list, one run's page, eight compared
    python benchmarks/board.py --long 400000     # also how long the first look at a run of so many steps takes

The runs grow in a process of their own, and the pages are open in a Chromium without a window. The time is the server
process's user and system time divided by the clock's: 100 % is one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.board_material import grow, held, make_run, record

TOTAL = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000, help="that each has at the beginning")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--long", type=int, default=0, help="steps of one more run, which is looked at once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for i in range(arguments.runs):
            make_run(
                root / f"run-{i:02d}",
                state="running",
                steps=arguments.steps,
                seed=i,
                train={"total_steps": TOTAL},
            )
        growing = get_context("spawn").Process(target=keep_growing, args=(root, arguments.steps), daemon=True)
        growing.start()
        words = [sys.executable, "-m", "trainway", "board", str(root), "--port", "0"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[0]
            measure(psutil.Process(server.pid), url, arguments.seconds)
            if arguments.long:
                first_look(root, url, arguments.long, psutil.Process(server.pid))
        finally:
            server.terminate()
            growing.terminate()
            server.wait()
            growing.join()


def keep_growing(root: Path, step: int) -> None:
    """Append a step to every run each second, holding their locks, as trainings do."""
    from contextlib import ExitStack

    from trainway.run_dir import RunDir

    runs = [RunDir(path) for path in sorted(root.iterdir()) if path.name.startswith("run-")]
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(held(run))
        due = time.monotonic()
        while True:
            step += 1
            for i, run in enumerate(runs):
                grow(run, step, step, seed=i, total=TOTAL)
                if step % 10 == 0:
                    with run.log.open("a") as log:
                        log.write(f"2026-01-01T00:00:00Z INFO [TRAIN] step {step}/{TOTAL}  loss 3.0000\n")
            due += 1.0
            time.sleep(max(0.0, due - time.monotonic()))


def measure(server: psutil.Process, url: str, seconds: float) -> None:
    """Print the share of a core for nobody, the list, a run and a comparison."""
    emit("nobody looks", used(server, seconds))
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        print("chromium is missing: no page is measured")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.get_by_role("link", name="run-07", exact=True).wait_for()
        pause = page.wait_for_timeout
        pause(5000)  # the first look reads every configuration
        emit("the list", used(server, seconds, pause))
        page.get_by_role("link", name="run-07", exact=True).click()
        page.wait_for_selector("canvas")
        pause(5000)
        emit("one run", used(server, seconds, pause))
        page.keyboard.press("Escape")
        for i in range(8):
            page.get_by_label(f"Compare run-{i:02d}", exact=True).check()
        page.get_by_role("button", name="Compare 8 runs").click()
        page.wait_for_selector("canvas")
        pause(10_000)
        emit("eight compared", used(server, seconds, pause))
        browser.close()


def used(
    server: psutil.Process, seconds: float, pause: Callable[[float], Any] | None = None
) -> dict[str, float]:
    """CPU seconds of the server, and its memory, over so long; `pause` takes milliseconds and keeps the page alive."""
    begin, started = server.cpu_times(), time.monotonic()
    if pause is None:
        time.sleep(seconds)
    else:
        pause(seconds * 1000)
    end, took = server.cpu_times(), time.monotonic() - started
    spent = end.user + end.system - begin.user - begin.system
    return {
        "cpu_s": round(spent, 2),
        "seconds": round(took, 1),
        "share": spent / took,
        "memory_mib": server.memory_info().rss / 2**20,
    }


def emit(what: str, found: dict[str, float]) -> None:
    print(
        f"{what:<16}{found['share']:7.2%} of a core  ({found['cpu_s']} s in {found['seconds']} s), {found['memory_mib']:.0f} MiB"
    )
    print(json.dumps({"what": what, **found}), file=sys.stderr)


def first_look(root: Path, url: str, steps: int, server: psutil.Process) -> None:
    """How long the list and the series of a run of so many steps take when they are asked for first, and again."""
    run = make_run(root / "long", state="done", steps=1)
    with run.metrics.open("w") as file:
        file.writelines(json.dumps(record(step, total=steps)) + "\n" for step in range(1, steps + 1))
    run.report.write_text(json.dumps({"steps": steps, "seconds": steps * 1.2}))
    print(f"a run of {steps:,} steps, {run.metrics.stat().st_size / 2**20:.0f} MiB")
    time.sleep(5)
    start = time.monotonic()
    runs = ask(f"{url}api/runs")["runs"]
    print(f"the list        {time.monotonic() - start:.2f} s")
    key = next(found["id"] for found in runs if found["name"] == "long")
    token = ""
    for what in ("first", "again"):
        start, size = time.monotonic(), 0
        while (found := ask(f"{url}api/runs/{key}/series?since={token}")).get("pending"):
            time.sleep(0.2)
        token, size = found["token"], len(json.dumps(found))
        print(
            f"its series, {what} {time.monotonic() - start:.2f} s, {size / 1024:.0f} KiB, server {server.memory_info().rss / 2**20:.0f} MiB"
        )


def ask(url: str) -> Any:
    with suppress(OSError), urllib.request.urlopen(url) as answer:
        return json.loads(answer.read())
    raise SystemExit(f"no answer from {url}")


if __name__ == "__main__":
    main()
