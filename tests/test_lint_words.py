"""The linter of words finds each kind of thing that it looks for."""

import json

import pytest
from test_examples import load_linter

lint = load_linter()

CLEAN = '''"""Codes of a stream."""


def decode(stream):
    """Decode a stream of codes."""
    values = list(stream)
    return values
'''


def findings(tmp_path, source):
    path = tmp_path / "module.py"
    path.write_text(source)
    return [rule for _, _, rule, _ in lint.check(path)]


def test_clean_source_has_no_findings(tmp_path):
    assert findings(tmp_path, CLEAN) == []


@pytest.mark.parametrize(
    "word",
    ["beside", "behind", "in front", "comes", "lies", "stands", "goes", "worth"],
)
@pytest.mark.parametrize(
    "place",
    [
        ("Decode a stream of codes.", "Decode a stream. The end {} it."),
        ("    values = ", "    # the end {} it\n    values = "),
        (
            "    return",
            "    if not values:\n        raise ValueError('{} it')\n    return",
        ),
    ],
    ids=["docstring", "comment", "message"],
)
def test_banned_words_are_found(tmp_path, word, place):
    old, new = place
    assert findings(tmp_path, CLEAN.replace(old, new.format(word))) == ["banned"]


def test_code_in_docstrings_is_not_read(tmp_path):
    source = CLEAN.replace("of codes.", "of codes.\n\n    `x behind y`\n    ")
    assert findings(tmp_path, source) == []


@pytest.mark.parametrize(
    "first, good",
    [
        ("What a stream holds.", False),
        ("The codes of a stream.", False),
        ("A decoder of streams.", False),
        ("Decodes a stream.", False),
        ("GPTQ: decode a stream.", True),
    ],
)
def test_first_words_of_functions(tmp_path, first, good):
    source = CLEAN.replace("Decode a stream of codes.", first)
    assert findings(tmp_path, source) == ([] if good else ["first-word"])


def test_a_module_says_what_it_is(tmp_path):
    source = CLEAN.replace("Codes of a stream.", "What a stream holds.")
    assert findings(tmp_path, source) == ["first-word"]


@pytest.mark.parametrize("name", sorted(lint.VARIABLES))
def test_variables_that_say_nothing(tmp_path, name):
    assert set(findings(tmp_path, CLEAN.replace("values", name))) == {"variable"}
    argument = CLEAN.replace("def decode(stream)", f"def decode(stream, {name})")
    assert findings(tmp_path, argument) == ["variable"]


def package(tmp_path, documentation):
    folder = tmp_path / "tiny"
    (folder / "room").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        '_NAMES = {"room.code": "decode"}\n_MODULES = {"room": "room"}\n'
    )
    (folder / "room" / "__init__.py").write_text('__all__ = ["encode"]\n')
    text = "\n    ".join(["Decode a stream.", "", *documentation])
    (folder / "room" / "code.py").write_text(
        f'def decode(stream, *, width):\n    """{text}\n    """\n'
    )
    return [(rule, text) for _, _, rule, text in lint.check_public(folder)]


ARGS = ["Args:", "  stream: bytes.", "  width: of a code.", ""]
EXAMPLE = ["Example:", "  >>> decode(b'12', width=1)"]


def test_public_names_need_arguments_and_an_example(tmp_path):
    assert package(tmp_path / "a", ARGS + EXAMPLE) == []
    assert package(tmp_path / "b", ARGS) == [("example", "decode: 0 lines of example")]
    short = [ARGS[0], ARGS[1], ""]
    wanted = [("args", "decode: width not in Args")]
    assert package(tmp_path / "c", short + EXAMPLE) == wanted


def test_the_baseline_only_falls(tmp_path, monkeypatch):
    allowed = tmp_path / "baseline.json"
    allowed.write_text(json.dumps({"banned": 5, "example": 5}))
    (tmp_path / "jaxcompress").mkdir()
    worse = CLEAN.replace("codes.", "codes behind it.")
    (tmp_path / "jaxcompress" / "module.py").write_text(worse)
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    monkeypatch.setattr(lint, "BASELINE", allowed)
    monkeypatch.setattr(lint, "check_public", lambda package: [])
    assert lint.main(["--lower"]) == 0
    assert json.loads(allowed.read_text()) == {"banned": 1}
    assert lint.main([]) == 0
    allowed.write_text("{}")
    assert lint.main([]) == 1
