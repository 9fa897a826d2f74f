"""Whatever others wrote into the files, a card stays a card: its metadata and its Markdown say what we say."""

import json
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cards.folders import save_sparse_model, save_structured_ticket, save_ticket
from hub.card_rules import card_metadata, card_problems
from sparse_hf import inspect, write_card
from sparse_hf.cards import card
from sparse_hf.cards.card import make_card
from sparse_hf.cards.inspection import Inspection, MixtureFacts, UnitsKept
from sparse_hf.cards.layers import MatrixZeros
from sparse_hf.cards.markdown import LONGEST, code, hub_id, literal, one_line, plain


ATTACKS = [
    "</code><script>alert(1)</script>",
    "\n---\nlicense: mit\n---\n# owned",
    "```\n# owned\n```",
    "x` <img src=x onerror=alert(1)> `",
    "| a | b |\n| --- | --- |\n# owned",
    "[click](javascript:alert(1)) ![](https://evil.example/x.png)",
    "https://evil.example www.evil.example me@evil.example @everyone",
    "{{ card_data }} {% for x in y %}",
    "a: b\n- c: *d\n!!python/object/apply:os.system [x]",
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00 \u2028 \ud800",
    "owned\n# owned\n===",
    "x" * 100_000,
    "' + __import__('os').system('x') + '",
    "$(rm -rf /) ; `id` && ${x}",
    "me/../../etc",
    "-",
    "",
]
text = st.one_of(st.sampled_from(ATTACKS), st.text(max_size=40))
RENDER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HEADINGS = {"How to load it", "What was done", "By layer", "What was measured", "Load of the experts"}


def hostile(word: str, kind: str = "sparse_model") -> Inspection:
    """An inspection in which every text is `word`."""
    return Inspection(
        name=word,
        kind=kind,
        method=word,
        config={word: word, "sparsity": word, "include": [word, {word: [word]}]},
        base_model=word,
        base_revision=word,
        model_type=word,
        metrics={word: 0.5, f"eval_{word}": 2},
        matrices=(MatrixZeros(word, 10, 5), MatrixZeros(f"layers.1.{word}", 10, 4)),
        counted="masks",
        units=(UnitsKept(word, "heads", 1, 2),) if kind == "structured_ticket" else (),
        mixture=MixtureFacts(4, 2, 1, "upcycled_model", word, {word: word}) if kind == "mixture" else None,
        parameters=100,
    )


@settings(max_examples=40)
@given(text, st.sampled_from(["sparse_model", "structured_ticket", "mixture", "ticket"]), st.booleans())
@example("lottery_ticket", "sparse_model", True)
def test_no_text_changes_what_a_card_says(word, kind, known):
    found = hostile(word, kind)
    if known:
        found = Inspection(**{**vars(found), "method": "lottery_ticket"})
    written = str(make_card(found, word or "x", {word: 1.5}))
    assert card_problems(written) == []
    data = card_metadata(written)
    assert data["library_name"] == "sparse_hf"
    assert set(data) <= {"base_model", "library_name", "pipeline_tag", "tags", "model-index"}
    assert len(written) < 20_000
    body = written.split("\n---\n", 1)[1]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028]", body)
    tokens = RENDER.parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert set(headings[1:]) <= HEADINGS
    raw = [token.content for token in (*tokens, *inline) if token.type in ("html_block", "html_inline")]
    assert [one.strip() for one in raw] == [f"<!-- {card.MARK} -->"]
    links = [
        child.attrs.get("href") or child.attrs.get("src") for child in inline if child.type in ("link_open", "image")
    ]
    assert all(link.startswith("https://huggingface.co/") for link in links)
    fences = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in fences][:1] == ["python"]
    assert len(fences) <= 2


@given(text)
def test_one_line_of_bounded_length(word):
    for shown in (one_line(word), code(word), literal(word), plain(word)):
        assert "\n" not in shown
        assert "\r" not in shown
    assert len(one_line(word)) <= LONGEST
    assert len(literal({word: [word] * 10})) <= LONGEST


@pytest.mark.parametrize("name", ["me/model", "gpt2", "meta-llama/Llama-3.2-1B"])
def test_what_an_id_is(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("name", ["/home/me/model", "../model", "a/b/c", "me/mo del", "me/x\n", "", None, 3, "-x"])
def test_what_no_id_is(name):
    assert hub_id(name) is None


@pytest.mark.parametrize(
    ("save", "change", "message"),
    [
        (save_sparse_model, {"metrics": [1]}, "`metrics` in .* must be a dict"),
        (save_sparse_model, {"method": {"a": 1}}, "`method` in .* must be a str"),
        (save_sparse_model, {"model_parameters": -1}, "`model_parameters` in .* must be in"),
        (save_structured_ticket, {"kind": "slim_model", "layers": [3]}, "The `layers` in .* must be objects"),
        (save_structured_ticket, {"layers": [{"layer": "x", "kept_heads": 10**4000}]}, "must be in"),
    ],
)
def test_descriptions_of_the_wrong_form_are_refused(tmp_path, save, change, message):
    folder = save(tmp_path / "it")
    (folder / "sparse_units.safetensors").unlink(missing_ok=True)
    path = folder / "sparse_hf.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        inspect(folder)


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    folder = save_sparse_model(tmp_path / "it")
    path = folder / "sparse_hf.json"
    metrics = {"good": 0.5, "text": "x", "true": True, "huge": 10**4000, "none": None, "runtime": 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": metrics}))
    assert inspect(folder).metrics == {"good": 0.5, "runtime": 3}


def test_a_ticket_replaces_one_with_a_written_card(tmp_path):
    folder = save_ticket(tmp_path / "it")
    card.write_card(folder)
    assert {"README.md", "sparsity.png"} <= {file.name for file in folder.iterdir()}
    save_ticket(folder)
    assert {file.name for file in folder.iterdir()} == {"sparse_hf.json", "sparse_masks.safetensors"}
    (folder / "README.md").write_text("# mine")
    with pytest.raises(FileExistsError, match="README.md"):
        save_ticket(folder)


def test_a_card_of_a_person_is_left_alone_and_one_of_a_program_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "draw_layers", lambda *_: None)
    folder = save_sparse_model(tmp_path / "it")
    readme = folder / "README.md"
    readme.write_text("# mine")
    assert write_card(folder) is None
    assert readme.read_text() == "# mine"
    draft = str(ModelCard.from_template(ModelCardData()))  # what PEFT saves with an adapter
    readme.write_text(draft.replace("[More Information Needed]", "mine", 1))
    assert write_card(folder) is None
    readme.write_text(draft)
    assert write_card(folder) == readme
    readme.write_text("<!-- This model card has been generated automatically according to the information ... -->")
    assert write_card(folder, "me/it") == readme
    assert "# it" in readme.read_text()
    readme.write_text(readme.read_text().replace(card.MARK, ""))  # as the card itself says
    assert write_card(folder, "me/other") is None
