"""The report in a real browser: no error, every figure has marks, a doc can be picked, hostile
texts stay texts."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from helpers import Run, user_error
from score_files import CURVES, write_run

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is here to open the report in"
)
HOSTILE = (
    "<script>window.hacked = 1</script></script></style><img src=x onerror='window.hacked=1'> {{ 7 "
    "* 7 }} \u202eright to left \u05e9\u05dc\u05d5\u05dd \U0001f600 NUL:\x00 &amp; \u2028 ]]> <!--"
)


def _open(page: Path, script: str, folder: Path, width: int = 1400) -> tuple[str, str]:
    """The DOM after `script` ran at the end of the page, and what went to the console."""
    copy = folder / "opened.html"
    start, _, end = page.read_text("utf-8").rpartition("</body>")
    copy.write_text(f"{start}<script>{script}</script></body>{end}", "utf-8")
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-sync "
        "--disable-component-update --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
    )
    result = subprocess.run(
        [
            *(CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}"),
            *(f"--window-size={width},900", copy.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return result.stdout, "\n".join(
        line for line in result.stderr.splitlines() if "CONSOLE" in line
    )


@needs_chromium
def test_a_report_opens_in_a_browser_without_errors_or_requests(
    sft_probe: Run, swept_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    assert sft_probe("sweep", run, "--generate", 4).returncode == 0
    result = sft_probe("report", run)
    assert result.returncode == 0, result.stderr
    page = run / "report.html"
    assert page.stat().st_size < 8_000_000
    pick = "[...document.querySelectorAll('#list li[title]')].at(-1).click();"
    dom, console = _open(page, pick, tmp_path)
    assert console == ""
    figures = re.findall(r'<div class="figure[^"]*" id="(figure-[\w-]+)"', dom)
    drawn = {
        name.removeprefix("figure-0-").removeprefix("figure-all-").removesuffix("_heldout")
        for name in figures
    }
    assert drawn == {
        "data_card",
        "squeezing",
        "changes",
        "levels",
        "parts",
        "docs",
        "tokens",
        "length",
        "code_length",
        "generations",
    }
    assert "greedy answer at step 4: " in dom
    for name in (*figures, "curves"):
        part = dom.partition(f'id="{name}"')[2].partition('<div class="figure')[0]
        marks = re.findall(r'class="mark-(?:line|symbol|rect|rule|area|text)[^"]*mark[^"]*"', part)
        assert marks, name
    assert "bicycles-4" in dom
    prompt = re.search(r'<div class="text" id="prompt"[^>]*>([^<]+)', dom)
    assert prompt is not None
    assert prompt[1].startswith("user: "), "the doc that was picked"
    assert dom.count('class="token"') > 100
    assert dom.count('role="option"') == 32
    for title in ("tiny", "Figures", "Single docs", "Manifest"):
        anchor = re.search(rf'<a href="#([\w-]+)">(?:<bdi>)?{title}<', dom)
        assert anchor is not None, title
        assert f'id="{anchor[1]}"' in dom
    assert "this is one run, so they leave out training noise" in dom
    assert not re.search(r'(?:src|href)="(?!data:|#)', page.read_text().partition("<script>")[0]), (
        "it loads nothing"
    )


@needs_chromium
def test_docs_are_searched_sorted_and_stepped_through(sft_probe: Run, tmp_path: Path) -> None:
    texts = {name: f"Said by {name}" for name in CURVES}
    run = write_run(tmp_path / "run", texts=texts)
    assert sft_probe("report", run).returncode == 0
    script = """
        const all = (path) => [...document.querySelectorAll(path)].map((n) => n.textContent);
        const set = (id, value, kind) => {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event(kind));
        };
        const press = (key) => document.getElementById('list').dispatchEvent(
          new KeyboardEvent('keydown', { key }));
        const seen = {};
        set('sort', '[-1,"rejected"]', 'change');
        seen.rose = all('#list .change');
        press('ArrowDown');
        seen.second = document.querySelector('#list [aria-selected=true] .change').textContent;
        seen.last = document.getElementById('at').value;
        press('ArrowLeft');
        seen.before = document.getElementById('at').value;
        set('search', 'rejected 17', 'input');
        seen.found = all('#list bdi');
        seen.responses = document.querySelectorAll('#responses h3').length;
        document.querySelector('[data-category=rejected]').click();
        seen.alone = document.querySelector('#responses h3').textContent;
        seen.pressed = document.querySelectorAll('.chip[aria-pressed=true]').length;
        setTimeout(() => {
          seen.wide = document.documentElement.scrollWidth > window.innerWidth;
          const panels = document.querySelectorAll('#figure-0-levels_heldout .mark-line path');
          seen.panels = panels.length;
          document.body.dataset.seen = JSON.stringify(seen);
        }, 8000);
    """
    dom, console = _open(run / "report.html", script, tmp_path, width=700)
    assert console == ""
    match = re.search(r'data-seen="([^"]+)"', dom)
    assert match is not None
    seen = json.loads(html.unescape(match[1]))
    changes = [float(text.replace("\u2212", "-")) for text in seen["rose"]]
    assert len(changes) == 24
    assert changes == sorted(changes, reverse=True)
    assert seen["second"] == seen["rose"][1]
    assert (seen["last"], seen["before"]) == ("optimizer step 8", "optimizer step 4")
    assert seen["found"] == ["d17"]
    assert seen["responses"] == len(CURVES)
    assert seen["alone"].startswith("rejected: ")
    assert seen["pressed"] == 1
    assert not seen["wide"], "nothing is wider than a window of 700 px"
    assert seen["panels"] == 1, "the other categories are not drawn"


@needs_chromium
def test_html_in_responses_is_shown_as_text(sft_probe: Run, tmp_path: Path) -> None:
    texts = dict.fromkeys(CURVES, HOSTILE) | {"rejected": "x" * 1_000_000}
    run = write_run(
        tmp_path / "<b>run", texts=texts, prompt=HOSTILE, num_docs=5, model="<i>&model</script>"
    )
    other = write_run(tmp_path / "other", seed=1)
    page = tmp_path / "out" / "report.html"
    result = sft_probe("report", run, other, "--out", page)
    assert result.returncode == 0, result.stderr
    assert page.stat().st_size < 8_000_000
    probe = (
        "document.body.dataset.hacked = String(window.hacked); document.body.dataset.images = "
        "document.images.length;"
    )
    dom, console = _open(page, probe, tmp_path)
    assert console == ""
    assert 'data-hacked="undefined"' in dom
    assert 'data-images="0"' in dom
    assert "<b>run" not in dom
    assert "&lt;script&gt;window.hacked" in dom, "it is shown, as text"
    assert "49" not in re.findall(r"onerror.{60}", dom)[0], "it is no template"
    assert "[cut: 1000002 characters]" in dom


def test_a_markdown_report_has_its_figures_beside_it(sft_probe: Run, tmp_path: Path) -> None:
    source = tmp_path / "a|b <i>.csv"
    source.write_text("step,category,logprob\n0,chosen,-100\n8,chosen,-88\n")
    result = sft_probe("report", source, "--format", "md", "--out", tmp_path / "report.md")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "report.md").read_text()
    assert "chosen rose 12.0 nats" in text
    assert r"a\|b &lt;i&gt;" in text
    other = sft_probe("report", source, "--format", "md", "--out", tmp_path / "other report.md")
    assert other.returncode == 0, other.stderr
    for stem, quoted in (("report", "report"), ("other report", "other%20report")):
        found = re.findall(
            rf"\({quoted}_figures/(.+?)\)", (tmp_path / f"{stem}.md").read_text("utf-8")
        )
        assert found
        for name in found:
            assert (tmp_path / f"{stem}_figures" / name).is_file(), name
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, (
        "a table with equal columns"
    )


def test_the_ledgers_of_a_run_are_shown_with_hostile_texts_as_text(
    sft_probe: Run, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", num_docs=5)
    part = {"category": "chosen", "measure": "logprob_with_eos", "step": 8, "low": 1.0, "high": 3}
    layer = {"category": "chosen", "first_step": 0, "last_step": 8, "kind": "mlp", "change": 1.5}
    carried = {"category": "chosen", "train_category": "chosen", "change": 1.5, "share": 0.75}
    tables = {
        "ledger": [{**part, "part": name, "change": 2.0} for name in ("text", "prompt", "whole")],
        "path": [{**layer, "layer": number} for number in (0, None)],
        "example_extremes": [
            {**carried, "end": end, "doc_id": f"d-{end}", "prompt": HOSTILE, "response": HOSTILE}
            for end in ("most", "least")
        ],
    }
    (run / "analysis").mkdir()
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(run / f"analysis/{name}.csv", index=False)
    result = sft_probe("report", run)
    assert result.returncode == 0, result.stderr
    text = (run / "report.html").read_text("utf-8")
    shown = html.unescape(text)
    assert "Training examples that carried least of chosen's path" in shown
    assert "<td><bdi>+75.0%</bdi></td>" in text
    assert "<img src=x onerror" not in text
    assert "<img src=x onerror='window.hacked=1'>" in shown
    for name in ("ledger_parts", "ledger_path"):
        assert f'id="figure-0-{name}"' in text
    assert sft_probe("report", run, "--format", "md").returncode == 0
    assert "carried most of chosen" in (run / "report.md").read_text("utf-8")
    names = {path.name for path in (run / "report_figures").iterdir()}
    assert {"ledger_parts.png", "ledger_path.png"} <= names


def test_a_report_of_a_run_with_one_step_is_refused(sft_probe: Run, tmp_path: Path) -> None:
    assert "one step only" in user_error(
        sft_probe("report", write_run(tmp_path / "short", steps=[0]))
    )
