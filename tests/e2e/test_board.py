"""The board in a real browser: a run that grows, names that are payloads, runs compared; light, dark and on a phone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.board_material import PAYLOADS, grow, held, make_job, make_run
from tests.browser import Opened, chromium, ink, opened, overflow
from tests.conftest import launch, tiny, write_config
from trainway.board.server import BoardServer
from trainway.board.watch import Board

__all__ = ["chromium"]


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))


@contextmanager
def board_of(root: Path) -> Iterator[str]:
    """The address of a board over `root`."""
    with BoardServer(Board(root), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def drawn_to(page: Any, chart: str = "Loss") -> int:
    """The newest step that a chart shows, as it says to those who cannot see it."""
    label = page.locator(f".chart-plot[aria-label^='{chart}']").first.get_attribute("aria-label")
    return max(map(int, re.findall(r"at step (\d+)", label or "")), default=0)


def until(page: Any, holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}\n{page.inner_text('body')[:2000]}"
        page.wait_for_timeout(100)


def no_fault(found: Opened) -> None:
    # a canvas that a test looks into is the test's own doing
    assert [error for error in found.errors if "willReadFrequently" not in error] == []
    origin = found.requests[0]
    assert all(address.startswith(origin) for address in found.requests)


def open_run(found: Opened, name: str) -> None:
    found.page.get_by_role("link", name=name, exact=True).click()
    found.page.wait_for_selector("canvas")


def test_a_run_grows_on_the_page_and_what_it_says_is_text(chromium: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    name = PAYLOADS[0].replace("/", "_")
    sample = {"step": 20, "prompt": PAYLOADS[0], "text": PAYLOADS[2]}
    run = make_run(root / name, state="running", steps=30, every=10, samples=[sample], log=f"{PAYLOADS[2]}\n")
    with held(run), board_of(root) as url, opened(chromium, url) as found:
        page = found.page
        open_run(found, name)
        until(page, lambda: drawn_to(page) == 30, "the first points")
        assert max(canvas["painted"] for canvas in ink(page, ".wide .chart")) > 500
        grow(run, 31, 45)
        until(page, lambda: drawn_to(page) == 45, "new points")
        page.wait_for_selector(".sample")
        assert page.locator("h1").inner_text() == name
        assert page.locator(".sample dd").all_inner_texts() == [PAYLOADS[0], PAYLOADS[2]]
        assert PAYLOADS[2] in page.locator(".log").inner_text()
        assert page.locator("main script, main img").count() == 0
        no_fault(found)


@pytest.mark.slow
def test_a_real_training_is_followed_to_its_end(
    chromium: Any, corpus: Path, store_dir: Path, tmp_path: Path
) -> None:
    config = tiny(corpus, store_dir, tmp_path / "runs" / "real", total_steps=4000)
    (tmp_path / "runs").mkdir()
    with board_of(tmp_path / "runs") as url, opened(chromium, url) as found:
        page = found.page
        until(page, lambda: "No runs here yet" in page.inner_text("main"), "an empty list")
        process = launch(write_config(tmp_path / "real.yaml", config))
        try:
            page.get_by_role("link", name="real", exact=True).wait_for(timeout=120_000)
            until(
                page, lambda: "running" in page.locator(".runs-table tbody").inner_text(), "a run that runs"
            )
            open_run(found, "real")
            until(page, lambda: drawn_to(page) > 0, "the first points")
            seen = [drawn_to(page)]
            for _ in range(3):
                until(page, lambda: drawn_to(page) > seen[-1], "more points")
                seen.append(drawn_to(page))
            painted = ink(page, ".wide .chart")
            assert seen == sorted(set(seen)) and painted[0]["painted"] > 500
            until(page, lambda: "[TRAIN] step" in page.locator(".log").inner_text(), "the log")
            until(page, lambda: page.locator(".sample").count() > 0, "samples")
            until(page, lambda: page.get_by_text("latest", exact=True).count() == 1, "checkpoints")
            process.terminate()
            assert process.wait(120) == 75
            until(page, lambda: page.locator(".head .state").inner_text() == "stopped", "its end")
            last = json.loads((tmp_path / "runs" / "real" / "metrics.jsonl").read_text().splitlines()[-1])[
                "step"
            ]
            until(page, lambda: drawn_to(page) == last, "its last step")
        finally:
            if process.poll() is None:
                process.kill()
        no_fault(found)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with runs of every state, with payloads wherever a text can stand."""
    root = tmp_path_factory.mktemp("several")
    runs = root / "runs"
    for i, name in enumerate(PAYLOADS):
        texts = {"prompt": name, "teacher": name, "student": name, "score": 0.5, "truncated": True}
        make_run(runs / name.replace("/", "_"), state="failed", steps=40 + i, every=10, error=name, warnings=1,
                 samples=[{"step": 40, **texts}], log=f"2026-11-22T00:00:00Z WARNING {name}\n", description=name)  # fmt: skip
    for i, lr in enumerate((1e-4, 3e-4, 1e-3)):
        make_run(
            runs / f"lr-{lr:g}", steps=200 + 50 * i, every=50, seed=i, floor=2.5 + 0.1 * i, optim={"lr": lr}
        )
    (runs / "broken").mkdir()
    (runs / "broken" / "metrics.jsonl").write_bytes(b'\xff\x00{"step": 1, "trai')
    make_job(root, "job-1", "runs/lr-0.001", reason=PAYLOADS[0])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_view_fits_and_shows_payloads_as_text(
    chromium: Any, several: Path, dark: bool, width: int
) -> None:
    with board_of(several) as url, opened(chromium, url, dark=dark, width=width) as found:
        page = found.page
        page.wait_for_selector("tbody tr")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(18, 21, 25)" if dark else "rgb(255, 255, 255)")
        assert page.locator(".runs-table tbody tr").count() == len(PAYLOADS) + 4
        names = page.locator("a.name").all_text_contents()
        assert {name.replace("/", "_") for name in PAYLOADS} <= set(names)
        assert overflow(page) == 0
        for name in ("lr-0.001", "broken", PAYLOADS[0].replace("/", "_")):
            page.get_by_role("link", name=name, exact=True).click()
            page.wait_for_selector("h1")
            if name != "broken":
                page.wait_for_selector("canvas")
            for details in page.locator("details:not([open]) > summary").all():
                if details.is_visible():
                    details.click()
            assert overflow(page) == 0, name
            page.keyboard.press("Escape")
            page.wait_for_selector("tbody tr")
        for name in ("lr-0.001", "lr-0.0003"):
            page.get_by_label(f"Compare {name}", exact=True).check()
        page.get_by_role("button", name="Compare 2 runs").click()
        page.wait_for_selector("canvas")
        page.get_by_text("Differences").wait_for()
        assert overflow(page) == 0
        assert page.locator("main script, main img").count() == 0
        no_fault(found)


@pytest.mark.slow
def test_runs_are_compared_by_curves_figures_and_settings(chromium: Any, several: Path) -> None:
    with board_of(several) as url, opened(chromium, url) as found:
        page = found.page
        for name in ("lr-0.0001", "lr-0.0003", "lr-0.001"):
            page.get_by_label(f"Compare {name}", exact=True).check()
        page.get_by_role("button", name="Compare 3 runs").click()
        page.get_by_text("Differences").wait_for()
        label = page.locator(".chart-plot[aria-label^='Training loss']").get_attribute("aria-label")
        for name, step in (("lr-0.0001", 200), ("lr-0.0003", 250), ("lr-0.001", 300)):
            assert re.search(rf"{name} [\d.]+ at step {step}", label)
        before = ink(page, ".wide .chart")[0]
        page.get_by_role("button", name="lr-0.001").click()
        until(
            page, lambda: ink(page, ".wide .chart")[0]["painted"] < before["painted"], "a run that is hidden"
        )
        rows = page.locator(".settings-table tbody tr").all_inner_texts()
        assert [row.split() for row in rows] == [["optim.lr", "0.0001", "0.0003", "0.001"]]
        best = page.locator(".figures-table tr", has_text="Validation loss").locator(".best-value")
        assert best.count() == 1
        no_fault(found)


@pytest.mark.slow
def test_the_list_is_searched_sorted_filtered_and_walked_by_keys(chromium: Any, several: Path) -> None:
    with board_of(several) as url, opened(chromium, url) as found:
        page = found.page
        page.wait_for_selector("tbody tr")

        def names() -> list[str]:
            return page.locator("a.name").all_text_contents()

        page.keyboard.press("/")
        page.keyboard.type("lr-")
        until(page, lambda: len(names()) == 3, "three found")
        page.get_by_role("button", name="Val. loss").click()
        assert names() == ["lr-0.001", "lr-0.0003", "lr-0.0001"]  # the longer, the lower
        page.get_by_role("button", name="Val. loss").click()
        assert names() == ["lr-0.0001", "lr-0.0003", "lr-0.001"]
        page.locator("#search").press("Escape")
        for key in ("ArrowDown", "x", "j", "x", "c"):
            page.keyboard.press(key)
        page.wait_for_selector("text=2 runs compared")
        page.keyboard.press("Escape")
        page.wait_for_selector("tbody tr")
        assert page.locator("#search").input_value() == "lr-"  # as it was left
        page.locator("#search").fill("")
        page.get_by_role("button", name=re.compile("failed")).click()
        assert len(names()) == len(PAYLOADS)
        page.locator("#search").fill("no such run")
        assert page.get_by_text("No run is like this.").is_visible()
        no_fault(found)


@pytest.mark.slow
def test_a_page_in_the_background_asks_less_and_one_without_its_board_says_so(
    chromium: Any, several: Path
) -> None:
    words = [sys.executable, "-m", "trainway", "board", str(several), "--port", "0"]
    board = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert board.stdout is not None
    try:
        with opened(chromium, board.stdout.readline().split()[0]) as found:
            page = found.page
            page.wait_for_selector("tbody tr")
            page.evaluate(
                "Object.defineProperty(document, 'hidden', {get: () => window.away}); window.away = true"
            )
            page.wait_for_timeout(4000)  # the question that was due already
            before = len(found.requests)
            page.wait_for_timeout(5000)
            assert len(found.requests) == before
            page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
            until(page, lambda: len(found.requests) > before, "a question once it is seen again")
            assert found.errors == []
            board.terminate()
            assert board.wait(30) == 0
            until(page, lambda: "does not answer" in page.locator("#pulse").inner_text(), "word of the end")
    finally:
        board.kill()
        board.wait()
