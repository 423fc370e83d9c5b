"""The list of published runs, and what is downloaded of it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import SHARED, Run, needs_shared, user_error

from sft_probe.analysis.stats.imports import published
from sft_probe.analysis.stats.imports.published import PublishedRun, RemoteFile, published_runs
from sft_probe.files import sha256_file

LINES = [
    json.dumps({"logps_eval_prob_train/chosen": -90.0 + step, "energy": 0.7}) for step in range(3)
]
CONTENT = "".join(f"{line}\n" for line in LINES).encode()


class _Handler(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = {"/a/metrics.json": CONTENT, "/long/metrics.json": CONTENT * 1000}.get(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What a local server was asked for, which holds the runs `good`, `changed`, `long`, `gone`."""
    monkeypatch.setenv("SFT_PROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    _Handler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    file = RemoteFile(
        url=f"{base}/a/metrics.json", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    files = {
        "good": file,
        "changed": replace(file, sha256="0" * 64),
        "long": replace(file, url=f"{base}/long/metrics.json"),
        "gone": replace(file, url=f"{base}/gone/metrics.json"),
    }
    linked = PublishedRun(
        name="linked", what="a test", licence="MIT", page=base, texts=None, files=()
    )
    runs = [linked, *(replace(linked, name=name, files=(one,)) for name, one in files.items())]
    monkeypatch.setattr(published, "published_runs", lambda: runs)
    yield _Handler.asked
    server.shutdown()
    server.server_close()


def test_a_run_is_downloaded_once_checked_imported_and_drawn(
    sft_probe: Run, asked: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        result = sft_probe("published", "get", "good")
        assert "runs/good: means over docs" in result.stdout, result.stderr
    assert asked == ["/a/metrics.json"]
    assert (tmp_path / "runs/good/figures/changes_train.png").is_file()
    assert "chosen rose 2.0 nats" in sft_probe("analyze", "runs/good").stdout
    (tmp_path / "cache/published/good/metrics.json").write_bytes(b"damaged")
    assert sft_probe("published", "get", "good", "--out", "again").returncode == 0
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("changed", f"is not the file that was listed: {len(CONTENT)} bytes, SHA-256"),
        ("long", f"is not the file that was listed: over {len(CONTENT)} bytes"),
        ("gone", "cannot be downloaded (HTTP Error 404"),
        ("linked", "is linked only (licence: MIT)"),
        ("god", "no published run 'god'. Did you mean good?"),
    ],
)
def test_what_is_not_as_listed_is_not_kept(
    sft_probe: Run, asked: list[str], tmp_path: Path, name: str, words: str
) -> None:
    assert words in user_error(sft_probe("published", "get", name))
    assert not list(tmp_path.rglob("metrics.json"))
    assert not (tmp_path / "runs").exists()


def test_the_list_names_licence_size_and_hash_of_every_file(sft_probe: Run) -> None:
    runs = published_runs()
    assert len({run.name for run in runs}) == len(runs) > 15
    for run in runs:
        assert run.page.startswith("https://")
        assert run.licence
        assert run.licence != "not stated" or not run.files
        names = [file.name for file in run.files]
        assert len(set(names)) == len(names), "they lie in one folder"
        assert run.texts is None or run.texts in names
        for file in run.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert re.match(r"https://raw\.githubusercontent\.com/\w+\S+/[0-9a-f]{40}/", file.url)
            assert 0 < file.size < 10_000_000
    text = sft_probe("published").stdout
    assert "linked only" in text
    for run in runs:
        assert f"{run.name}: {run.what}" in text
    text = sft_probe("published", "list", "--files", "pythia-70m").stdout
    assert text.count("https://raw.githubusercontent.com/EleutherAI/pythia/") == 27


@needs_shared
def test_the_hashes_are_those_of_the_files_that_are_here() -> None:
    folder = SHARED / "reference/learning-dynamics"
    listed = {file.sha256 for run in published_runs() for file in run.files}
    paths = [*folder.glob("*.npy"), *folder.glob("*.json")]
    assert len(paths) == 4
    for path in [*paths, SHARED / "data/helpful-base/probe_train.jsonl"]:
        assert sha256_file(path) in listed, path


@needs_shared
def test_both_stages_of_a_published_run_share_a_figure(sft_probe: Run, tmp_path: Path) -> None:
    folder = SHARED / "reference/learning-dynamics"
    for name in ("qwen1.8b_sft_chosen", "qwen1.8b_dpo_after_sft"):
        source = folder / f"{name}.metrics.json"
        assert sft_probe("import", source, "--out", tmp_path / name).returncode == 0
    runs = (f"sft={tmp_path}/qwen1.8b_sft_chosen", f"dpo={tmp_path}/qwen1.8b_dpo_after_sft")
    out = tmp_path / "both"
    result = sft_probe("plot", *runs, "--out", out, "--format", "svg")
    assert result.returncode == 0, result.stderr
    svg = (out / "changes_train.svg").read_text()
    assert ">sft<" in svg
    assert ">dpo<" in svg
