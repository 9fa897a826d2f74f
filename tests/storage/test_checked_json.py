"""A JSON file from elsewhere is read or refused in one sentence."""

import pytest

from sparse_hf.storage.checked_json import DEEPEST_JSON, LARGEST_JSON, field, read_json


def written(folder, content):
    path = folder / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_object_is_read(tmp_path):
    assert read_json(written(tmp_path, '{"a": [1, null, "ä"]}')) == {"a": [1, None, "ä"]}


def test_deepest_allowed_nesting_is_read(tmp_path):
    levels = DEEPEST_JSON - 2  # the object and the innermost 0
    content = read_json(written(tmp_path, '{"a": ' + "[" * levels + "0" + "]" * levels + "}"))
    for _ in range(levels):
        content = {"a": (content["a"])[0]}
    assert content == {"a": 0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ("[1]", "must hold a JSON object, got a list"),
        ("3", "got a int"),
        ("null", "got a NoneType"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": -Infinity}', "-Infinity is no JSON value"),
        (b'{"a": "\xff\xfe"}', "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested more than"),
        ("[" * 900 + "]" * 900, "nested more than"),
        ("[" * 1_000_000, "not valid JSON"),
        ('{"a":' * 500_000, "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "file.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(ValueError, match=f"at most {LARGEST_JSON} bytes of JSON, got {LARGEST_JSON + 1}"):
        read_json(path)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [("x", str, "x"), (3, int, 3), ({}, dict, {}), (True, bool, True), (None, int, "default")],
)
def test_field_of_its_type(tmp_path, value, kind, expected):
    assert field({"a": value}, "a", kind, tmp_path, "default") == expected


def test_missing_field_is_the_default(tmp_path):
    assert field({}, "a", int, tmp_path, 7) == 7


@pytest.mark.parametrize(("value", "kind"), [(True, int), ("1", int), (1.0, int), ([], dict), ({}, str), (0, bool)])
def test_field_of_another_type_is_refused(tmp_path, value, kind):
    with pytest.raises(ValueError, match=f"`a` in `.*` must be a {kind.__name__}, got"):
        field({"a": value}, "a", kind, tmp_path)


def test_refused_field_is_shown_in_short(tmp_path):
    with pytest.raises(ValueError, match="must be a int") as caught:
        field({"a": "x" * 10**6}, "a", int, tmp_path)
    assert len(str(caught.value)) < 300
