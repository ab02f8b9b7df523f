"""scripts/watch.py: the page of a run in headless Chromium, as a file that renews itself."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import watch
from playwright.sync_api import Page, Request, expect
from watching.page import page as html_of
from watching.page import thinned
from watching.records import records_of

from oracles.browser import chromium

EVIL = "</script><b id='evil'>bold</b>"


def record(step: int) -> dict:
    figures = dict(step=step, loss=4 / step, learning_rate=1e-3, tokens=90, seconds=0.5)
    figures |= {"grad_norm": 2.0 / step, "update_norm/A": 0.1, "update_norm/B": 0.2}
    figures |= {"read_tokens": 100, "memory_gib": 11.26, "peak_share": 0.41}
    if step % 5 == 0:
        samples = [{"prompt": EVIL, "text": f"text of step {step}"}]
        figures |= {"eval_loss": 3.0 if step == 5 else 3.5, "samples": samples}
    return figures


def write(folder: Path, steps: int, ended: bool) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(record(i)) + "\n" for i in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(lines) + '{"step": 9')
    run = {
        "steps": 20,
        "settings": {"batch_size": 4, "optimizer": "adamw", "neftune_alpha": None},
        "model": {"name": "demo", "dtype": "bfloat16"},
        "lora": {"r": 16},
        "data": {"name": "rows.jsonl", "sequences": 1000, "tokens": 64000},
        "device": {"name": "a card"},
        "result": {"ended": "today"} if ended else {},
    }
    (folder / "run.json").write_text(json.dumps(run))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """An empty tab. Fails if a script has an error or the page loads anything but itself."""
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def on_request(request: Request) -> None:
        if not (request.is_navigation_request() or request.url.startswith("data:")):
            errors.append(request.url)

    page.on("request", on_request)
    yield page
    context.close()
    assert not errors


def run_script(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, arguments)])
    watch.main()


def test_the_file_follows_the_run_until_it_ends(page, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "first"
    write(folder, 12, ended=False)
    run_script(monkeypatch, folder, "--once", "--every", "0.2")
    path = folder / "watch.html"
    assert path.as_uri() in capsys.readouterr().out
    page.goto(path.as_uri())
    expect(page.get_by_role("status")).to_have_text("step 12 of 20, running")
    expect(page.get_by_role("img")).to_have_count(6)
    tiles = page.locator("#tiles")
    for text in ("0.3333", "3.5000", "lowest, after step 5", "200", "41 %", "11.3 GiB", "4 s"):
        expect(tiles).to_contain_text(text)
    expect(page.get_by_text("text of step 10")).to_be_visible()
    write(folder, 20, ended=True)
    run_script(monkeypatch, folder, "--every", "0.2")
    expect(page.get_by_role("status")).to_have_text("step 20 of 20, ended")
    expect(page.get_by_text("text of step 20")).to_be_visible()


def test_texts_are_shown_as_texts_and_older_ones_can_be_read(page, tmp_path):
    write(tmp_path, 20, ended=True)
    (tmp_path / "page.html").write_text(html_of(tmp_path, 5.0)[0])
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.get_by_text(EVIL)).to_be_visible()
    assert page.locator("#evil").count() == 0
    page.get_by_label("after step").select_option("5")
    expect(page.get_by_text("text of step 5")).to_be_visible()
    page.get_by_text("Settings").click()
    expect(page.get_by_text("rows.jsonl: 1,000 sequences of 64,000 tokens")).to_be_visible()
    page.locator("svg").first.hover()
    expect(page.locator(".reading").first).to_contain_text("step 1")


def test_the_page_fits_a_phone(page, tmp_path):
    write(tmp_path, 20, ended=True)
    (tmp_path / "page.html").write_text(html_of(tmp_path, 5.0)[0])
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_server_makes_the_page_for_each_request(page, tmp_path, monkeypatch, capsys):
    write(tmp_path, 3, ended=False)
    servers = []

    class Server(watch.ThreadingHTTPServer):
        def serve_forever(self, poll_interval: float = 0.01) -> None:
            servers.append(self)
            threading.Thread(target=super().serve_forever, args=(0.01,), daemon=True).start()

        def server_close(self) -> None:
            """It is closed at the end of the test."""

    monkeypatch.setattr(watch, "ThreadingHTTPServer", Server)
    run_script(monkeypatch, tmp_path, "--port", "0", "--every", "0.2")
    url = capsys.readouterr().out.split()[1]
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("step 3 of 20, running")
    write(tmp_path, 20, ended=True)
    expect(page.get_by_role("status")).to_have_text("step 20 of 20, ended")
    servers[0].shutdown()
    watch.ThreadingHTTPServer.__bases__[0].server_close(servers[0])


def test_long_runs_are_thinned_and_other_folders_refused(tmp_path):
    many = [record(i) for i in range(1, 10_000)]
    kept = thinned(many)
    assert len(kept) < 4000 and kept[-1] == many[-1]
    assert [r for r in kept if "eval_loss" in r] == [r for r in many if "eval_loss" in r]
    with pytest.raises(SystemExit, match="expected an output_dir"):
        records_of(tmp_path)
