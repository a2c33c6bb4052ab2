"""The house: commands that exist, a map that is true, a stub that is current, two versions."""

import re
import tomllib
from pathlib import Path
from typing import Any

import torch

import kvspec
from kvspec.clauses import rooms
from needs import native

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def test_every_command_in_the_table_exists() -> None:
    commands = re.findall(r"^\| `make (\w+)", CONTRIBUTING, re.M)
    assert set(commands) == MAKE_TARGETS


def test_the_map_names_every_room_and_only_rooms() -> None:
    mapped = re.findall(r"^\| `(\w+)` \| `([A-Z]+)` \|", CONTRIBUTING, re.M)
    assert mapped == [(name, room["prefix"]) for name, room in rooms()["room"].items()]


def test_paths_in_the_documents_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "spec/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:spec|python|cpp|include|tests|bench)/[\w./]*)`", text):
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_the_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def run_the_example_of(section: str, **names: Any) -> dict[str, Any]:
    """The names that a section of the README leaves, from its `import torch` on."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = readme.partition(f"## {section}")[2].partition("\n## ")[0]
    code = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    exec("\n".join(code[code.index("import torch, kvspec") :]), names)
    return names


@native
def test_the_example_of_host_memory_does_what_it_says() -> None:
    names = run_the_example_of("Where every byte comes from")
    assert names["table"].shape == (512, 512)
    assert names["arena"].resident_bytes() == 2**20
    assert names["received"] == b"batch 1"
    assert names["while_paused"] == 0
    names["reader"].close()
    names["writer"].close()
    names["segment"].close()


@native
def test_the_example_of_transformers_does_what_it_says() -> None:
    from kvspec.conformance.generate_cache import language_model, plain, words

    prompt, question = words(40), words(5, seed=9)
    names = run_the_example_of(
        "Prefix reuse in transformers", model=language_model(), prompt=prompt, question=question
    )
    counted = names["cache"].counters()
    assert counted["cached_tokens"] == (40 + 64 - 1) // 16 * 16
    assert counted["prompt_tokens"] == 40 + (40 + 64 + 5)
    assert torch.equal(names["second"], plain("thin", names["prompt"], {"max_new_tokens": 64}))
    names["cache"].close()


@native
def test_the_example_of_sliding_windows_does_what_it_says() -> None:
    names = run_the_example_of("Sliding windows", prompt=list(range(4096)))
    assert len(names["found"].device_indices) == 4096
    assert names["windows"].all()
    assert sum(page.tombstone for page in names["tree"].view().pages.values()) == 192


@native
def test_the_example_of_a_scheduler_does_what_it_says() -> None:
    from kvspec.conformance.scheduler.worker import words

    names = run_the_example_of("A scheduler")
    for name, said in names["said"].items():
        assert said == words([*range(100), ord(name)], 8, vocabulary=50)
    assert names["scheduler"].counters()["cached_tokens"] == 192  # two of three find 96


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert project["version"] == kvspec.__version__
    assert f"VERSION {kvspec.__version__} " in cmake
    assert f"## {kvspec.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@native
def test_the_stub_is_what_the_build_generates() -> None:
    """`make stub` renews it. mypy reads the committed one, so it must not drift."""
    from kvspec import _core

    assert _core.__file__ is not None
    built = Path(_core.__file__).with_name("_core.pyi").read_text(encoding="utf-8")
    assert built == (ROOT / "python/kvspec/_core.pyi").read_text(encoding="utf-8")
