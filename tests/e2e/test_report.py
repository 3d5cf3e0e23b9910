"""The report in a real browser: drawn, silent, in light and dark, on a phone, on paper; and of a real run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium, ink, opened, overflow
from tests.conftest import run_cli, tiny, write_config
from tests.report_material import HOSTILE, make_run, write_lines
from trainway.report.page import write_report

__all__ = ["chromium"]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "report.py"
PAPER = {False: "rgb(255, 255, 255)", True: "rgb(18, 21, 25)"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("report") / "run <b>'\"&", name=HOSTILE)
    return write_report([run]).path


def assert_drawn(page: Any, *, charts: int) -> None:
    """Every chart has a canvas with axes and lines: many painted pixels, in more colours than an axis alone has."""
    found = ink(page, "main")
    assert len(found) == charts == page.locator("figure.chart").count()
    for canvas in found:
        assert canvas["painted"] > 500 and canvas["colours"] > 20, found


def test_a_browser_draws_the_report_and_has_nothing_to_complain_of(page: Path, chromium: Any) -> None:
    with opened(chromium, page.as_uri()) as found:
        assert found.page.title() == "run <b>'\"& · Trainway"
        assert_drawn(found.page, charts=8)
        assert found.page.evaluate("window.hit") is None
        # shown as text, in a sample and in the command
        assert (
            found.page.locator("pre", has_text="</script><script>window.hit=1</script><img src=x").count() > 1
        )
        assert found.page.locator("img").count() == 0
        assert found.requests == [page.as_uri()]
        assert found.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_as_light_or_dark_as_its_reader_wants(page: Path, chromium: Any, dark: bool) -> None:
    with opened(chromium, page.as_uri(), dark=dark) as found:
        colour = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == PAPER[dark]
        before = found.page.locator("canvas").first.evaluate("c => c.toDataURL()")
        assert_drawn(found.page, charts=8)
        # the charts follow while the page is open
        found.page.emulate_media(color_scheme="light" if dark else "dark")
        found.page.wait_for_timeout(100)
        assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[not dark]
        assert found.page.locator("canvas").first.evaluate("c => c.toDataURL()") != before
        assert found.errors == []


@pytest.mark.slow
def test_it_fits_a_phone(page: Path, chromium: Any) -> None:
    with opened(chromium, page.as_uri(), width=390, height=844) as found:
        found.page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert overflow(found.page) == 0
        assert_drawn(found.page, charts=8)
        widths = found.page.evaluate(
            "[...document.querySelectorAll('.chart-plot')].map((p) => p.clientWidth)"
        )
        assert set(widths) == {390 - 2 * 16}
        found.page.set_viewport_size({"width": 844, "height": 390})  # turned
        found.page.wait_for_timeout(200)
        assert overflow(found.page) == 0
        assert found.errors == []


@pytest.mark.slow
def test_keys_walk_along_a_chart_and_a_drag_zooms_all_of_them(page: Path, chromium: Any) -> None:
    with opened(chromium, page.as_uri()) as found:
        plots, tips = found.page.locator(".chart-plot"), found.page.locator(".chart-tip:visible")
        assert tips.count() == 0
        assert "validation 3 at step 40" in plots.first.get_attribute("aria-label")
        plots.first.focus()
        found.page.keyboard.press("Home")
        assert tips.count() == 1  # the others follow without a word
        assert "step 0" in tips.inner_text() and "validation9" in tips.inner_text().replace("\n", "")
        found.page.keyboard.press("ArrowRight")
        assert "step 1" in tips.inner_text()
        found.page.keyboard.press("End")
        assert "step 40" in tips.inner_text()

        over = found.page.locator(".u-over")
        box = over.first.bounding_box()
        found.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
        found.page.mouse.down()
        found.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
        found.page.mouse.up()
        zoomed = found.page.locator(".chart-tool:visible", has_text="see all")
        assert zoomed.count() == plots.count()
        zoomed.first.click()
        assert zoomed.count() == 0
        found.page.locator(".chart-tool", has_text="log").first.click()
        assert_drawn(found.page, charts=8)
        assert found.errors == []


@pytest.mark.slow
def test_it_prints_in_ink_on_white(page: Path, chromium: Any, tmp_path: Path) -> None:
    with opened(chromium, page.as_uri(), dark=True) as found:
        found.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        found.page.wait_for_timeout(100)
        assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[False]
        assert found.page.locator(".uplot").first.evaluate("u => u.clientWidth") == 330
        found.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        found.page.wait_for_timeout(100)
        assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[True]
        assert found.page.locator(".uplot").first.evaluate("u => u.clientWidth") > 900
        assert len(found.page.pdf()) > 20_000


@pytest.mark.slow
def test_runs_beside_each_other_are_shown_and_hidden(chromium: Any, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "one"),
        make_run(tmp_path / HOSTILE.replace("/", "_"), loss=2.0, **{"optim.lr": 7e-4}),
    ]
    page = write_report(runs, tmp_path / "both.html").path
    with opened(chromium, page.as_uri()) as found:
        assert_drawn(found.page, charts=9)
        toggle = found.page.locator(".toggle").nth(1)
        assert "window.hit=1" in toggle.inner_text()
        canvas = found.page.locator("canvas").first
        both = canvas.evaluate("c => c.toDataURL()")
        toggle.click()
        found.page.wait_for_timeout(100)
        assert toggle.get_attribute("aria-pressed") == "false"
        assert canvas.evaluate("c => c.toDataURL()") != both
        toggle.click()
        found.page.wait_for_timeout(100)
        assert canvas.evaluate("c => c.toDataURL()") == both
        assert overflow(found.page) == 0
        assert found.page.evaluate("window.hit") is None and found.errors == []


@pytest.mark.slow
def test_measures_of_distillation_have_their_charts(chromium: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "gad")
    names = (
        "discriminator_loss",
        "discriminator_accuracy",
        "teacher_score",
        "student_score",
        "kl",
        "response_length",
    )
    records = [
        {"step": s, "gad/stage": "warm-up", **{f"gad/{name}": s / 9 for name in names}} for s in range(1, 9)
    ]
    write_lines(run / "metrics.jsonl", records)
    with opened(chromium, write_report([run]).path.as_uri()) as found:
        titles = found.page.locator(".chart-title").all_inner_texts()
        assert [title.split("\n")[0] for title in titles] == [
            "Discriminator's lossnats per pair", "Discriminator's accuracyshare of pairs", "Rewardsmean score",
            "KL to the referencenats per token", "Length of answerstokens",
        ]  # fmt: skip
        assert_drawn(found.page, charts=5)
        assert found.errors == []


@pytest.mark.slow
def test_400_000_steps_are_less_than_3_megabytes(tmp_path: Path, chromium: Any) -> None:
    run = benchmark().make_run(tmp_path / "long", 400_000)
    written = write_report([run])
    assert written.bytes < 3_000_000
    with opened(chromium, written.path.as_uri()) as found:
        assert_drawn(found.page, charts=11)
        assert found.errors == []


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("report_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(corpus: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    config = write_config(directory / "tiny.yaml", tiny(corpus, store_dir, directory / "run"))
    run_cli("train", config, "optim.weight_decay=0.05")
    return directory / "run"


@pytest.mark.slow
def test_training_leaves_its_report_behind(trained: Path, chromium: Any) -> None:
    start = json.loads((trained / "start.json").read_text())
    assert start["origins"]["optim.weight_decay"] == "command line"
    assert "tiny.yaml:" in start["origins"]["train.total_steps"]
    assert start["origins"]["train.z_loss"] == "default"
    assert start["device"] == "cpu" and start["total_steps"] == 20
    assert start["data"]["splits"]["train"]["documents"] > 300
    assert {part["name"] for part in start["plan"]["memory"]} >= {"weights", "gradients", "optimiser"}
    assert 0 < start["plan"]["counted_bytes"] <= start["plan"]["peak_bytes"] < start["plan"]["device_bytes"]

    with opened(chromium, (trained / "report.html").as_uri()) as found:
        text = found.page.inner_text("main")
        assert "done" in text and "Planned memory" in text and "Checkpoints" in text and "step 20" in text
        assert "best" in text and "latest" in text
        assert_drawn(found.page, charts=8)
        assert found.errors == []


@pytest.mark.slow
def test_the_verb_writes_where_it_is_told_and_says_so(trained: Path, tmp_path: Path) -> None:
    done = run_cli("report", trained, "--out", tmp_path / "new" / "page.html", "--json")
    found = json.loads(done.stdout)
    assert found["path"] == str(tmp_path / "new" / "page.html")
    assert found["bytes"] == (tmp_path / "new" / "page.html").stat().st_size
    assert found["runs"] == [{"path": str(trained), "state": "done", "step": 20}]
    refused = run_cli("report", tmp_path, check=2)
    assert "is no run directory" in refused.stderr and "Traceback" not in refused.stderr
