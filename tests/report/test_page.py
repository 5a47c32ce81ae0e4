"""The page in headless Chromium: every plot is drawn, with the numbers of the run folder; nothing is asked from outside."""

import json
import shutil
import threading
import time

import pytest

from moedist.report import read_run, write_report
from moedist.report.serve import make_server
from tests.report.browser import opened, start_chromium

ONE_RUN = {"loss", "perplexity", "throughput", "ranks", "shares", "balance", "loads", "plan", "compression", "phases",
           "routing", "traffic"}


@pytest.fixture(scope="module")
def browser():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as driver:
        started = start_chromium(driver)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(watched, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report([read_run(watched)], path)
    return path


def lines(run, name):
    """step -> value, from the JSONL."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in found if line.get(name) is not None}


def last(run, name):
    return list(lines(run, name).values())[-1]


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 1280), ("light", 390)])
def test_all_plots_are_drawn_without_errors_or_requests(browser, page_file, scheme, width):
    with opened(browser, page_file.as_uri(), width, scheme=scheme) as found:
        assert found.errors == [] and found.requests == [page_file.as_uri()]
        drawn = found.drawn()
        assert set(drawn) == ONE_RUN and all(drawn.values()), drawn
        # nothing is wider than the screen, and text can be told from what is behind it
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        text, back, label = found.page.evaluate("""() => [getComputedStyle(document.body).color,
            getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.xtick text')).fill]""")
        light = [sum(map(int, colour.strip("rgb()").split(","))) / 3 for colour in (text, back, label)]
        assert (light[0] < 60 and light[1] > 200 and light[2] < 60) if scheme == "light" else \
            (light[0] > 200 and light[1] < 60 and light[2] > 200)
        sizes = found.page.evaluate("""() => [...document.querySelectorAll('.plot text')].map(
            text => parseFloat(getComputedStyle(text).fontSize))""")
        assert min(sizes) >= 10  # points on a phone too


def test_numbers_are_those_of_the_run_folder(browser, page_file, watched):
    with opened(browser, page_file.as_uri()) as found:
        plots = found.plots()
        summary = dict(row.split("\t") for row in found.page.inner_text("table").splitlines())
    for plot in ("loss", "perplexity", "throughput", "balance", "routing", "traffic"):
        assert plots[plot]
        for trace in plots[plot]:
            assert dict(zip(trace["customdata"], trace["y"])) == lines(watched, trace["meta"]), trace["meta"]
            assert trace["x"] == [step * 8 * 32 for step in trace["customdata"]]  # tokens
    assert {trace["meta"] for trace in plots["loss"]} == {"train/loss", "valid/loss"}
    assert {trace["meta"] for trace in plots["throughput"]} == {"perf/tokens_per_s", "perf/tokens_per_s_bound"}
    assert {trace["meta"] for trace in plots["ranks"]} == {"expert_ms", "dense_ms", "all_to_all_ms", "wait_ms"}
    for trace in plots["ranks"]:
        assert trace["x"] == [last(watched, f"rank/{r}/{trace['meta']}") for r in (0, 1)]
    rows, speeds = ([last(watched, f"rank/{r}/{name}") for r in (0, 1)] for name in ("rows", "rows_per_s"))
    points = plots["shares"][1]
    assert points["x"] == pytest.approx([s / sum(speeds) for s in speeds])
    assert points["y"] == pytest.approx([n / sum(rows) for n in rows])
    loads = [json.loads(line) for line in (watched / "loads.jsonl").read_text().splitlines()]
    for trace in plots["loads"]:
        columns = [line["loads"][str(trace["meta"])] for line in loads]
        assert trace["x"] == [line["step"] * 8 * 32 for line in loads]
        assert [list(column) for column in zip(*trace["z"])] == [[n * 8 / sum(c) for n in c] for c in columns]
    plan = json.loads((watched / "plans.jsonl").read_text().splitlines()[0])["plan"]
    assert plots["plan"][0]["z"] == [[owners[0] for owners in layer[1]] for layer in plan["layers"]]
    compression = json.loads((watched / "compression-00000020.json").read_text())
    assert sum(map(sum, plots["compression"][0]["z"])) == sum(e["hidden"] for e in compression["experts"])
    assert plots["phases"][1]["y"] == pytest.approx([sum(e["bytes"] for e in compression["experts"]) / 2**20])
    assert summary["training loss"] == f"{last(watched, 'train/loss'):.4f}" and summary["steps"] == "30 of 30"
    assert summary["validation perplexity"] == f"{last(watched, 'valid/perplexity'):.2f}" and summary["ranks"] == "2"


def test_runs_side_by_side(browser, watched, tmp_path):
    other = tmp_path / "b<script>old"  # a folder's name is no part of the page's code
    shutil.copytree(watched, other, ignore=shutil.ignore_patterns("wandb", "checkpoints", "profile"))
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records if r["step"] <= 20))
    write_report([read_run(watched), read_run(other)], tmp_path / "both.html")
    with opened(browser, (tmp_path / "both.html").as_uri()) as found:
        assert found.errors == [] and len(found.requests) == 1
        plots, drawn = found.plots(), found.drawn()
        assert all(drawn.values()) and len(drawn) == 3 + 2 * (len(ONE_RUN) - 3)
        assert [t["y"] for t in plots["loss"] if t["meta"] == "train/loss"] == \
            [list(lines(run, "train/loss").values()) for run in (watched, other)]
        header = found.page.inner_text("thead").strip().split("\t")
        assert header[-2:] == [watched.name, other.name]
        assert "20 of 30" in found.page.inner_text("tbody")


def test_serve_follows_a_run(browser, watched, tmp_path):
    run = tmp_path / watched.name
    shutil.copytree(watched, run, ignore=shutil.ignore_patterns("wandb", "checkpoints", "profile"))
    with make_server([str(run)], "127.0.0.1", 0, refresh_s=0.2) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        with opened(browser, address) as found:
            before = found.plots()["loss"][0]["y"]
            with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": 35, "train/tokens": 35 * 256, "train/loss": 1.25}) + "\n")
                file.write('{"step": 40, "train/tok')  # is being written
            deadline = time.monotonic() + 30
            while found.plots()["loss"][0]["y"] != [*before, 1.25]:
                assert time.monotonic() < deadline, "the page has not taken up the new line in 30 s"
                time.sleep(0.1)
            assert "1.2500" in found.page.inner_text("table") and "35 of 30" in found.page.inner_text("table")
            assert all(found.drawn().values()) and found.errors == []
            assert all(url.startswith(address) for url in found.requests)
        server.shutdown()
        thread.join()
