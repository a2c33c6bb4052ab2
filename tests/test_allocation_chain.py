"""The allocation chain: the suite, the command, and strace where it is."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvspec
import kvspec.oracle
from kvspec import allocation_chain
from kvspec.allocation_chain import Observation, Request, observe, record, strace
from kvspec.allocation_chain.recording import helper
from kvspec.allocation_chain.ring import BYTES, empty_ring, read_ring
from kvspec.cli import main
from kvspec.conformance.allocation_chain import AllocationChainConformance
from kvspec.conformance.allocation_chain.recordings import facts
from kvspec.interfaces.host_memory import ArenaKind


class TestOracle(AllocationChainConformance):
    impl = kvspec.oracle


class TestNative(AllocationChainConformance):
    impl = kvspec


MIB = 1 << 20
_CLAUSE = "kvspec: HOST" + "-"


def given(kind: ArenaKind, **options: Any) -> Request:
    return Request(kind, MIB, **options)


def test_system_calls_are_seen_where_strace_is() -> None:
    """And where it is not, or is refused, there are none, and it is said why."""
    refused = strace.why_not()
    found = observe(record(given("mmap", touch="page")))
    if refused is not None:
        assert (found.system_calls, found.sources["system_calls"].why_not) == (None, refused)
        return
    calls = [(call.phase, call.name) for call in found.system_calls or ()]
    assert ("allocate", "mmap") in calls
    assert ("free", "munmap") in calls
    assert not {name for phase, name in calls if phase == "touch"}
    mapped = next(call for call in found.system_calls or () if call.name == "mmap")
    assert mapped.result == hex(found.address)
    seen = next(call for call in found.library_calls or () if call.function == "mmap")
    assert abs(mapped.at_ns - seen.at_ns) < 1_000_000 + seen.took_ns


def test_without_strace_nothing_is_said_of_system_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    strace.why_not.cache_clear()
    try:
        assert main(["alloc", "mmap", "1MiB", "--trace"]) == 0
        assert strace.refused_filter("shm_open") is None
    finally:
        strace.why_not.cache_clear()
    out = capsys.readouterr().out
    assert "not observed: system calls: strace is not installed" in out
    assert "not observed: timeline: it was not touched" in out
    assert "system call  " not in out


def test_json_alone_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alloc", "heap", "128KiB", "--touch", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = msgspec.convert(json.loads(out), Observation)
    assert (found.request.nbytes, found.request.touch, found.version) == (131072, "page", 1)
    assert found.timeline is not None


def test_tables_a_file_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = tmp_path / "found.json", tmp_path / "time.png"
    options = ["--touch-by", "all", "--trace", "--json", str(report), "--plot", str(plot)]
    assert main(["alloc", "shm", "1MiB", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for told in ("HostBlock('shm', 1048576)", "shm_open(", "posix_fallocate", "shared memory"):
        assert told in out
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["request"]["touch"] == "all"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not Path("/dev/shm", found["name"].strip("/")).exists()


def test_a_read_maps_the_page_of_zeros() -> None:
    found = observe(record(given("mmap", touch="read"), trace=False))
    touched = found.states["touched"]
    assert touched.mapping is not None
    if found.machine["transparent_huge_pages"] != "always":
        assert (touched.mapping.rss, touched.range_resident) == (0, MIB)


def test_populate_has_the_pages_before_the_touch() -> None:
    found = observe(record(given("mmap", populate=True, touch="page"), trace=False))
    allocated, touch = found.states["allocated"], found.phase("touch")
    assert allocated.range_resident == MIB
    assert touch is not None
    assert touch.minor_faults == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["heap"], "BYTES is missing"),
        (["heap", "12MB"], "CHAIN-9: '12MB' is no number of bytes"),
        (["heap", "4096", "--huge-pages", "explicit"], _CLAUSE),
        (["--pid", "1073741824"], "CHAIN-13: there is no process 1073741824"),
        (["heap", "4096", "--pid", "1"], "one of them"),
        (["--claims", "--pid", "1"], "one of them"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["alloc", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1


def test_what_the_machine_has_not_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Before a page is touched: a kernel that overcommits would begin, and kill."""
    assert main(["alloc", "mmap", "64TiB", "--populate"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvspec: BUDGET-3: {64 << 40} bytes (65536.00 GiB) of mmap for 'alloc'")
    assert err.count("\n") == 1


def test_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alloc"]) == 0
    assert "kvspec alloc KIND BYTES" in capsys.readouterr().out


def test_a_running_process_is_shown_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    script = "import mmap, sys; m = mmap.mmap(-1, 1 << 20); m[:] = m[:]; print(1); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert main(["alloc", "--pid", str(child.pid)]) == 0
        told = capsys.readouterr().out
        assert main(["alloc", "--pid", str(child.pid), "--json", "-"]) == 0
        child.communicate(timeout=30)
    for kind in ("heap", "anonymous", "shared memory", "file", "stack", "kernel", "all"):
        assert kind in told
    groups = {group["kind"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    assert groups["shared memory"]["size"] >= MIB
    assert groups["heap"]["mappings"] == 1


def test_the_claims_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts()
    monkeypatch.setattr(allocation_chain, "gather", lambda: found)
    assert main(["alloc", "--claims"]) == 0
    out = capsys.readouterr().out
    assert "posix_memalign" in out
    assert "131,049" in out
    assert main(["alloc", "--claims", "--json", "-"]) == 0
    assert {each["clause"] for each in json.loads(capsys.readouterr().out)} >= {"CHAIN-15"}


def test_an_interruption_leaves_nothing_behind() -> None:
    seen: list[int] = []

    def interrupt(touched: int) -> None:
        seen.append(touched)
        raise KeyboardInterrupt

    before = set(os.listdir("/dev/shm"))
    with pytest.raises(KeyboardInterrupt):
        record(given("shm", touch="page"), interrupt, trace=False)
    assert seen == [4096 * (MIB // 64 // 4096)]
    mine = {name for name in set(os.listdir("/dev/shm")) - before if ".alloc." in name}
    assert not mine


def test_threads_are_told_apart_and_none_is_lost() -> None:
    """Four threads allocate at once between the marks of one."""
    ring = os.memfd_create("kvspec-test")
    try:
        os.ftruncate(ring, BYTES)
        os.pwrite(ring, empty_ring(), 0)
        library = helper("libkvspec_interposer.so")
        assert library is not None
        environment = {"LD_PRELOAD": str(library), "KVSPEC_CHAIN_RING": f"{ring},{BYTES}"}
        subprocess.run(
            [sys.executable, "-S", "-c", _THREADS],
            env=os.environ | environment,
            pass_fds=[ring],
            check=True,
            timeout=60,
        )
        entries, dropped = read_ring(os.pread(ring, BYTES, 0))
    finally:
        os.close(ring)
    calls = [entry for entry in entries if entry.function == "malloc" and entry.values[0] == 7777]
    assert dropped == 0
    assert len(calls) == 400
    assert sorted(Counter(call.thread for call in calls).values()) == [100] * 4
    assert all(call.result and call.begin_ns <= call.end_ns for call in calls)


_THREADS = """
import ctypes, threading
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def work():
    for _ in range(100):
        libc.malloc(7777)
threads = [threading.Thread(target=work) for _ in range(4)]
libc.kvspec_chain_begin(1)
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.kvspec_chain_end()
"""
