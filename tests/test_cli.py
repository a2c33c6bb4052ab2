"""The command line: what goes where, and how faults are told."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvspec
import kvspec.oracle
from kvspec.cli import main
from kvspec.flight_recorder import read_log
from kvspec.flight_recorder.events import CacheFinishedReq, MatchPrefix
from needs import native

LINE = '{"timestamp": 0, "input_length": %d, "output_length": 1, "hash_ids": %s}\n'
TRACE = "".join(
    LINE % pair for pair in [(8, "[1, 2]"), (17, "[1, 2, 3, 5, 6]"), (4, "[4]"), (7, "[1, 2]")]
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


def test_version_names_the_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    core = "native core" if kvspec.has_native() else "oracle only: the extension is absent"
    assert capsys.readouterr().out == f"kvspec {kvspec.__version__} ({core})\n"


def test_help_is_printed_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "replay" in capsys.readouterr().out


def test_a_table_is_printed(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), "--capacity", "3", "--impl", "oracle"]) == 0
    out, err = capsys.readouterr()
    for told in ("4 requests", "10 blocks of 4 tokens", "36 tokens", "40.00%", "no leak", "oracle"):
        assert told in out
    assert err == ""


def test_json_alone_goes_to_standard_output(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["replay", str(trace), "--json", "-", "--impl", "oracle", "--granularity", "node"]
    assert main([*given, "--capacity", "3", "4", "--policy", "lru", "fifo"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert (report["trace"], report["block"], report["requests"]) == (str(trace), 4, 4)
    order = [(run["policy"], run["capacity"], run["granularity"]) for run in report["runs"]]
    assert order == [(p, c, "node") for p in ("lru", "fifo") for c in (3, 4)]


def test_json_and_plot_are_written_to_files(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zipped = tmp_path / "trace.jsonl.gz"
    zipped.write_bytes(gzip.compress(TRACE.encode()))
    report, plot = tmp_path / "counts.json", tmp_path / "curve.png"
    outputs = ["--json", str(report), "--plot", str(plot)]
    assert main(["replay", "--impl", "oracle", "--capacity", "2", "4", str(zipped), *outputs]) == 0
    assert [run["capacity"] for run in json.loads(report.read_text())["runs"]] == [2, 4]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "policy" in capsys.readouterr().out


def test_a_workload_is_generated_without_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["replay", "--requests", "5", "--seed", "7", "--block", "256", "--impl", "oracle"]
    assert main([*given, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["trace"], report["block"]) == ("generated, seed 7", 256)
    assert report["requests"] == 5


def test_leave_last_token_reaches_the_replay(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hits = []
    for option in ([], ["--leave-last-token"]):
        assert main(["replay", str(trace), "--impl", "oracle", "--json", "-", *option]) == 0
        hits.append(json.loads(capsys.readouterr().out)["runs"][0]["hit_blocks"])
    assert hits == [4, 3]


def test_a_window_adds_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["replay", str(trace), "--impl", "oracle", "--capacity", "5"]
    assert main(given) == 0
    assert "window pool" not in capsys.readouterr().out
    assert main([*given, "--sliding-window", "4", "--swa-ratio", "0.6"]) == 0
    out, err = capsys.readouterr()
    for told in ("sliding window of 4 tokens", "window pool", "tombstones", "no leak", "100.0%"):
        assert told in out
    assert err == ""


def test_a_window_adds_a_key_to_each_run(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["replay", str(trace), "--impl", "oracle", "--json", "-", "--sliding-window", "4"]
    assert main([*given, "--capacity", "5", "10"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    told = [(run["window"]["sliding_window"], run["window"]["swa_capacity"]) for run in runs]
    assert told == [(4, 5), (4, 10)]


@pytest.mark.parametrize("capacities", [["5"], ["5", "6", "8"]], ids=["one", "several"])
def test_windows_are_drawn(trace: Path, tmp_path: Path, capacities: list[str]) -> None:
    plot = tmp_path / "windows.png"
    given = ["replay", str(trace), "--impl", "oracle", "--sliding-window", "4", "--swa-ratio", "1"]
    assert main([*given, "--capacity", *capacities, "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("check", ["off", "counts", "sets", "ledger"])
def test_every_level_prints_the_same_table(
    check: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(trace), "--impl", "oracle", "--check", check]) == 0
    out, err = capsys.readouterr()
    assert "40.00%" in out
    assert "no leak" in out
    assert err == ""


@pytest.mark.parametrize("kind", ["ndjson", "msgpack"])
def test_a_log_is_recorded(
    kind: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / f"log.{kind}"
    given = ["replay", str(trace), "--impl", "oracle", "--record", str(log), "--tokens"]
    assert main(given) == 0
    assert capsys.readouterr().err == ""
    events = list(read_log(log))
    keys = [event.key for event in events if isinstance(event, MatchPrefix | CacheFinishedReq)]
    assert sum(len(key.tokens) for key in keys) == 6
    assert main(given) == 2
    assert capsys.readouterr().err.startswith("kvspec: REC-8: ")


@native
@pytest.mark.parametrize("impl", ["native", "oracle"])
def test_verify_drives_both(
    impl: str, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["replay", str(trace), "--capacity", "3", "--verify", "--impl", impl]
    assert main(given) == 0
    assert impl in capsys.readouterr().out
    monkeypatch.setattr(kvspec.oracle.RadixCache, "digest", lambda cache: 0)
    assert main(given) == 1
    assert capsys.readouterr().err.startswith("kvspec: REPLAY-7: request 0: cache.digest(): ")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["replay", "no/such/file"], "No such file or directory: 'no/such/file'"),
        (["replay", "--capacity", "0"], "--capacity"),
        (["replay", "--capacity", "many"], "--capacity"),
        (["replay", "--policy", "clock"], "'clock' is not one of lru, lfu"),
        (["replay", "--no-such-option"], "No such option: --no-such-option"),
        (["replay", "--sliding-window", "0"], "--sliding-window"),
        (["replay", "--sliding-window", "64", "--policy", "lfu"], "REPLAY-10: a sliding window"),
        (["replay", "--sliding-window", "640000"], "REPLAY-10: a window pool of 10000 blocks"),
        (["replay", "--swa-ratio", "0.5"], "REPLAY-10: swa_ratio is 0.5 without"),
        (["replay", "--check", "set"], "--check"),
        (["replay", "--tokens"], "REPLAY-16: tokens are recorded in a file"),
        (["replay", "--record", "log", "--capacity", "5", "6"], "--record takes one run"),
        (["replay", "one", "two"], "(two)"),
        (["surprise"], "No such command 'surprise'"),
    ],
)
def test_a_fault_of_the_caller_is_one_line(
    given: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvspec: ")
    assert err.count("\n") == 1
    assert reason in err


def test_a_malformed_line_is_told_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(TRACE + "{\n")
    command = [sys.executable, "-c", "import sys; from kvspec.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*command, "replay", str(path), "--json", "-"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"kvspec: REPLAY-1: {path}:5: not JSON: ")
    assert done.stderr.count("\n") == 1


def test_the_native_core_is_asked_for_in_vain(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvspec.implementations.has_native", lambda: False)
    assert main(["replay", str(trace), "--impl", "native"]) == 2
    told = "kvspec: the native core is absent: only the oracle can run\n"
    assert capsys.readouterr().err == told


def test_a_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvspec.cli.find_spec", lambda name: None)
    assert main(["replay", "--plot", "curve.png"]) == 2
    assert "pip install 'kvspec[plot]'" in capsys.readouterr().err


def test_leaks_are_told_and_fail(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Leaking(kvspec.oracle.RadixCache):
        def reset(self) -> None:
            super().reset()
            self.token_to_kv_pool_allocator.alloc(4)

    monkeypatch.setattr(kvspec.oracle, "RadixCache", Leaking)
    assert main(["replay", str(trace), "--impl", "oracle", "--capacity", "3"]) == 1
    out, err = capsys.readouterr()
    assert "1 pages leaked" in out
    assert err.startswith("lru at 3 blocks:\nCHECK-1: page ")
