"""The report page: what it says of a run, what it leaves out, and that no word of a run can do anything on it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.report_material import GIB, HOSTILE, START, make_run, write_json, write_lines
from trainway.errors import ConfigError, EnvironmentFault
from trainway.report.facts import read_run
from trainway.report.page import END_BYTES, write_at_end, write_report
from trainway.report.sections import asked, cards, marks, settings
from trainway.run_dir import RunDir

TOKEN = "hf_" + "Zq8" * 10


class Page(HTMLParser):
    """A page as a browser reads it: its tags, its text, its inline scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html, self.tags, self.text = html, [], ""
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.data, self.policy = "", ""
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        held = dict(attributes)
        self.tags.append((tag, held))
        if held.get("http-equiv") == "Content-Security-Policy":
            self.policy = held["content"] or ""
        if tag in self.inline:
            self._open = "data" if held.get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, text: str) -> None:
        match self._open:
            case "data":
                self.data += text
            case "":
                self.text += text
            case name:
                self.inline[name].append(text)

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>([^<]+)</h2>", self.html)


def page_of(*runs: Path, out: Path | None = None) -> Page:
    return Page(write_report(list(runs), out).path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "small")


def test_a_run_has_all_its_sections(run: Path) -> None:
    page = page_of(run)
    assert page.headings == [
        "Training", "Speed and memory", "Planned memory", "Warnings", "Samples", "Data", "Configuration", "Environment",
    ]  # fmt: skip
    for words in ("small", "done", "pretrain", "4.23M parameters", "2026-11-22 04:57 UTC", "A <fast> CPU"):
        assert words in page.text, words
    assert (run / "report.html").exists()


def test_the_cards_hold_the_runs_figures(run: Path) -> None:
    found = {card.label: (card.value, list(card.notes)) for card in cards(read_run(run, 100))}
    assert found == {
        "Validation loss": ("3.0000", ["best 2.7500 at step 20", "perplexity 20.09"]),
        "Tokens": ("81,920", ["40 steps"]),
        "Time": ("1 min 30 s", ["forecast 3 min 00 s"]),
        "Tokens per second": ("910", ["920 while it trains"]),
        "MFU": ("31.0 %", ["mean of all steps"]),
        "Cost": ("$0.20", ["forecast $0.40", "at $8.00 an hour"]),
        "Peak memory": ("1.50 GiB", ["planned 2.00 GiB"]),
    }


def test_a_run_that_has_just_begun_shows_what_there_is(run: Path) -> None:
    for name in ("report.json", "provenance.json", "start.json", "samples.jsonl", "log.txt"):
        (run / name).unlink()
    write_json(run / "status.json", state="running", step=0)
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 9.0}, {"step": 2, "train/loss": 8.5}])
    page = page_of(run)
    assert page.headings == ["Training", "Configuration"]
    assert "killed" in page.text and "newest checkpoint" in page.text  # nobody holds its lock
    assert [(card.label, card.value) for card in cards(read_run(run, 100))] == [
        ("Training loss", "8.5000"),
        ("Steps", "2"),
    ]
    (run / "metrics.jsonl").unlink()
    assert page_of(run).headings == ["Configuration"]


def test_settings_are_shown_with_where_they_are_from(run: Path) -> None:
    groups = {group["title"]: group["table"].rows for group in settings(read_run(run, 100))}
    assert ["train.total_steps", "40", "command line"] in groups["Set for this run"]
    assert ["data.train", "corpus.jsonl", f"{HOSTILE}:3"] in groups["Set for this run"]
    assert [row[0] for row in groups["Defaults"]] == ["seed"]
    assert groups["From presets"] == [["optim.lr", groups["From presets"][0][1], "preset cpu_small"]]


def test_the_plans_memory_is_a_bar_of_its_parts(run: Path) -> None:
    page = page_of(run)
    bars = [
        held
        for tag, held in page.tags
        if tag == "rect" and held.get("class", "").startswith("fill-") and held["height"] == "26"
    ]
    assert [(bar["x"], bar["width"]) for bar in bars] == [("0.00", "375.00"), ("375.00", "125.00")]
    assert "4.0 GiB of the 8.0 GiB of this machine at the fullest moment of a step." in page.text
    assert marks(read_run(run, 100)) == {"perf/memory_gib": [("planned 2.00", 2.0)]}


def test_memory_near_the_devices_is_drawn_with_the_device(run: Path) -> None:
    write_json(run / "start.json", **{**START, "plan": {**START["plan"], "device_bytes": 2 * GIB}})
    assert marks(read_run(run, 100))["perf/memory_gib"] == [("planned 2.00", 2.0), ("device 2", 2.0)]


def test_the_data_report_counts_and_shares(run: Path) -> None:
    text = page_of(run).text
    for words in (
        "1,430,000",
        "4.55",
        "5,585 rows make an epoch",
        "3 malformed records were set aside",
        "75.0 %",
        "books <b>",
    ):
        assert words in text, words
    assert "duplicates" not in text  # there were none


def test_warnings_are_counted_and_errors_named(run: Path) -> None:
    text = page_of(run).text
    assert "step 7 left out: the loss is 41.2 (1 so far)" in text
    assert text.count("the disk <b>fills</b>") == 1 and "2 ×" in text and "2026-11-22 05:00:00" in text
    assert "error: it stands still" in text and "INFO" not in text


@pytest.mark.parametrize(
    ("skipped", "said"), [(0, ""), (1, "One step was left out"), (3, "3 steps were left out")]
)
def test_steps_that_were_left_out_are_told(run: Path, skipped: int, said: str) -> None:
    result = json.loads((run / "report.json").read_text())
    write_json(run / "report.json", **{**result, "skipped_steps": skipped})
    text = page_of(run).text
    assert said in text and ("left out: the warnings say why" in text) == (skipped > 0)


def test_samples_are_the_newest_first_and_few(run: Path) -> None:
    records = [
        {"step": step, "prompt": "p", "text": str(step), "reference": "r"} for step in range(0, 5001, 5)
    ]
    write_lines(run / "samples.jsonl", records)
    (item,) = asked(read_run(run, 100))
    steps = [int(answer["text"]) for answer in item["answers"]]
    assert len(steps) == 8 and steps[0] == 5000 and steps[-1] == 0 and steps == sorted(steps, reverse=True)
    gaps = [a - b for a, b in pairwise(steps)]
    assert max(gaps) < 1.2 * min(gaps)
    assert item["reference"] == "r"


def test_no_word_of_a_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)</script>".replace("/", "\u2215"), name=HOSTILE)
    write_lines(run / "metrics.jsonl", [{"step": 1, HOSTILE: 1.0, "train/loss": 2.0}])
    page = page_of(run)
    allowed = {"script": 4, "style": 2, "img": 0, "iframe": 0, "object": 0, "base": 0, "form": 0}
    tags = [tag for tag, _ in page.tags]
    assert {tag: tags.count(tag) for tag in allowed} == allowed
    assert not [held for _, held in page.tags if any(key.startswith("on") or key == "style" for key in held)]
    assert not [value for _, held in page.tags for key, value in held.items() if key in ("src", "href")]
    assert "<script>alert(1)" in page.text and "<img src=x onerror=window.hit=2>" in page.text
    assert "{{7*7}}" in page.text
    titles = [chart["title"] for chart in json.loads(page.data)["charts"]]
    assert HOSTILE in titles
    assert not set("<>&\u2028\u2029") & set(page.data)


def test_the_policy_allows_exactly_what_is_there(run: Path) -> None:
    page = page_of(run)
    parts = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert parts["default-src"] == parts["base-uri"] == parts["form-action"] == "'none'"
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        hashes = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.inline[tag]
        ]
        assert parts[name].split() == [f"'sha256-{found}'" for found in hashes] and hashes


def test_no_secret_reaches_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / f"run-{TOKEN}", description=f"with {TOKEN}")
    (run / "log.txt").write_text(
        f"2026-11-22T04:58:00Z WARNING warning: 401 for Bearer {TOKEN} at https://me:{TOKEN}@host\n"
    )
    write_lines(run / "samples.jsonl", [{"step": 1, "prompt": f"key {TOKEN}", "text": f"answer {TOKEN}"}])
    write_lines(run / "metrics.jsonl", [{"step": 1, f"val/{TOKEN}": 1.0}])
    write_json(run / "provenance.json", argv=["trainway", f"--hub.token={TOKEN}"], hostname=TOKEN)
    write_json(
        run / "start.json", origins={"optim.lr": f"{TOKEN}.yaml:3"}, data={"splits": {}, "warnings": [TOKEN]}
    )
    write_json(run / "status.json", state="failed", step=1, error=f"refused {TOKEN}")
    html = write_report([run]).path.read_bytes()
    assert TOKEN.encode() not in html and b"***" in html
    both = write_report([run, make_run(tmp_path / "other")], tmp_path / "both.html").path.read_bytes()
    assert TOKEN.encode() not in both


def test_control_characters_are_shown_and_not_sent(run: Path) -> None:
    write_lines(
        run / "samples.jsonl", [{"step": 1, "prompt": "a\x1b[31m\u202eb\x00", "text": "tab\tand\r\nline"}]
    )
    text = page_of(run).text
    assert "a\ufffd[31m\ufffdb\ufffd" in text and "tab\tand\nline" in text


def test_values_that_are_no_number_are_gaps_and_told(run: Path) -> None:
    nan = float("nan")
    write_lines(
        run / "metrics.jsonl",
        [{"step": k, "train/loss": nan if k == 2 else 1.0, "val/loss": nan} for k in range(1, 5)],
    )
    page = page_of(run)
    assert json.loads(page.data)["series"][0]["mean"] == [1.0, None, 1.0, 1.0]
    assert "train/loss was not a finite number at one step." in page.text
    assert "val/loss was not a finite number at 4 steps." in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(run: Path) -> None:
    (run / "report.json").write_text('{"tokens": ')
    (run / "provenance.json").write_text("[]")
    (run / "start.json").write_bytes(b"\xff")
    page = page_of(run)
    for name in ("report.json", "provenance.json", "start.json"):
        assert f"Not readable: {name}" in page.text
    assert "Training" in page.headings and "Environment" not in page.headings


@pytest.mark.parametrize(
    "plan", [[], {"memory": 3}, {"device_bytes": "x"}, {"memory": [], "device_bytes": True}]
)
def test_a_start_of_another_form_is_passed_over(run: Path, plan: Any) -> None:
    write_json(run / "start.json", plan=plan, data=[], origins=None, device=None)
    assert "Planned memory" not in page_of(run).headings


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", loss=2.5, **{"optim.lr": 7e-4}),
        make_run(tmp_path / "c" / "a"),
    ]
    page = page_of(*runs, out=tmp_path / "all.html")
    assert page.headings == ["Results", "Settings that differ", "Training", "Speed and memory", "Samples"]
    rows = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", page.html)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    by_name = {row[0]: row[1:] for row in cells}
    assert by_name[f"{tmp_path.name}/b"][:3] == ["done", "2.5000", "2.2500"]
    assert by_name["optim.lr"][1] == "0.0007" and len(set(by_name["optim.lr"])) == 2
    assert "train.total_steps" not in by_name  # the same in all
    found = json.loads(page.data)
    assert found["runs"] == [f"{tmp_path.name}/a", f"{tmp_path.name}/b", "c/a"]  # two bear one name
    charts = {chart["title"]: chart for chart in found["charts"]}
    assert {"Loss: training", "Loss: validation"} <= set(charts)
    assert [(line["label"], line["colour"], line["run"]) for line in charts["Loss: validation"]["lines"]] == [
        (name, i, i) for i, name in enumerate(found["runs"])
    ]
    assert len(found["steps"]) == 2  # shared by all: those of training, and of validation
    toggles = [held["data-run"] for tag, held in page.tags if tag == "button"]
    assert toggles == ["0", "1", "2"]
    assert page.text.count("answer of step 40") == 6


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        write_report([tmp_path])


def test_a_run_given_twice_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        write_report([run, run / ".." / run.name])


def test_a_page_that_cannot_be_written_leaves_the_old_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report([run])
    old = (run / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainway.files.os.fsync", full)
    with pytest.raises(EnvironmentFault):
        write_report([run])
    assert (run / "report.html").read_bytes() == old
    assert not list(run.glob("*.tmp-*"))


def test_the_end_of_a_run_survives_a_report_that_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("trainway.report.page.read_run", broken)
    write_at_end(RunDir(run))
    assert not (run / "report.html").exists()
    (run / "metrics.jsonl").unlink()
    write_at_end(RunDir(run))  # not even metrics


def test_the_end_of_a_long_run_does_not_wait_for_its_report(run: Path) -> None:
    write_at_end(RunDir(run))
    assert (run / "report.html").exists()
    (run / "report.html").unlink()
    with (run / "metrics.jsonl").open("ab") as file:
        file.truncate(END_BYTES + 1)
    write_at_end(RunDir(run))
    assert not (run / "report.html").exists()
