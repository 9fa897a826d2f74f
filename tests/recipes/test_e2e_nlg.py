"""The E2E data on rows written here: format, ids and labels, groups, decoding."""

import copy
import gzip

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from e2e_nlg import (
    END,
    IGNORED,
    NEW_PARAGRAPH,
    ban_repeats,
    collate,
    decoding,
    encode,
    encode_context,
    end_of,
    ends_of,
    generate,
    generated_text,
    group_references,
    linearise,
    load_e2e,
    part_tokens,
)


ROWS = 'mr,ref\n"name[Cotto], eatType[pub]","Cotto is a pub."\n"name[Cotto], eatType[pub]","It\'s a pub, Cotto."\n'


@pytest.fixture(scope="module")
def tokenizer():
    words = {"[UNK]": 0, "name": 1, ":": 2, "Cotto": 3, "is": 4, "a": 5, "pub": 6, ".": 7, "Type": 8, "|": 9}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_slots_take_the_names_of_lora():
    meaning = "name[The Mill], eatType[pub], priceRange[£20-25], customer rating[5 out of 5], familyFriendly[no]"
    expected = "name : The Mill | Type : pub | price : £ 20 - 25 | customer rating : 5 out of 5 | family friendly : no"
    assert linearise(meaning) == expected
    assert linearise("name[Café, Rouge], near[All Bar One]") == "name : Café , Rouge | near : All Bar One"
    with pytest.raises(ValueError, match="got `a pub`"):
        linearise("a pub")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's family-friendly,  near Cotto.", "It 's family - friendly , near Cotto ."),
        ("'The Mill' isn't cheap; it's £20-£25.", "' The Mill ' is n't cheap ; it 's £ 20-£25 ."),
        ("A 5-star pub, .Cotto costs £30.99..", "A 5-star pub , .Cotto costs £ 30.99 .."),
        ("Cotto,thats Italian food.It is 20-25", "Cotto , that s Italian food . It is 20 - 25"),
        ("Cotto is a high- price pub .", "Cotto is a high- price pub ."),
    ],
)
def test_tokens_are_parted_as_in_loras_test_file(text, expected):
    assert part_tokens(text) == expected
    assert part_tokens(expected) == expected


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_release_file(tmp_path, suffix):
    path = tmp_path / f"dev{suffix}"
    path.write_bytes(gzip.compress(ROWS.encode()) if suffix.endswith(".gz") else ROWS.encode())
    data = load_e2e(str(path))
    assert data["context"][:] == ["name : Cotto | Type : pub"] * 2
    assert data["completion"][:] == ["Cotto is a pub .", "It 's a pub , Cotto ."]


def test_a_file_of_lora_is_taken_as_it_is(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text("name : Cotto||It isn 't . \n")
    assert load_e2e(str(path))[:] == {"context": ["name : Cotto"], "completion": ["It isn 't ."]}
    path.write_text("name : Cotto\n")
    with pytest.raises(ValueError, match="must read `context\\|\\|text`"):
        load_e2e(str(path))


def test_a_hub_data_set_under_its_own_names(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    (tmp_path / "validation.csv").write_text(ROWS.replace("mr,ref", "meaning_representation,human_reference"))
    assert len(load_e2e(dataset_name=str(tmp_path), split="validation")) == 2


def test_sources_that_do_not_fit(tmp_path):
    (tmp_path / "a.csv").write_text("mr,text\nname[a],b\n")
    with pytest.raises(ValueError, match="columns mr, ref; it has: mr, text"):
        load_e2e(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="either `file` or `dataset_name`"):
        load_e2e()


def test_labels_are_the_text_and_its_end(tokenizer):
    row = {"context": "name : Cotto", "completion": "a pub ."}
    assert encode_context(row["context"], tokenizer) == [1, 2, 3, END]
    assert encode(row, tokenizer) == {
        "input_ids": [1, 2, 3, END, 5, 6, 7, END],
        "labels": [IGNORED] * 4 + [5, 6, 7, END],
    }
    assert encode(row, tokenizer, max_length=6) == {
        "input_ids": [1, 2, 3, END, 5, 6],
        "labels": [IGNORED] * 4 + [5, 6],
    }


def test_batches_are_padded_and_the_padding_counts_for_nothing():
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, END, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    left = collate([{"input_ids": row["input_ids"]} for row in rows], side="left")
    assert left["input_ids"].tolist() == [[1, 2, 3], [END, END, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert "labels" not in left


def test_references_are_grouped_by_context_in_order(tmp_path):
    (tmp_path / "a.csv").write_text("mr,ref\nname[b],x\nname[a],y\nname[b],z\n")
    groups = group_references(load_e2e(str(tmp_path / "a.csv")))
    assert list(groups.items()) == [("name : b", ["x", "z"]), ("name : a", ["y"])]


def test_generated_text_ends_at_the_first_end(tokenizer):
    for end in (END, NEW_PARAGRAPH):
        assert generated_text([3, 4, end, 5], tokenizer) == "Cotto is"
    assert generated_text(torch.tensor([3, 4]), tokenizer) == "Cotto is"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=END + 1, n_embd=4, n_layer=1, n_head=1, n_positions=80)).eval()


def always_answer(model, scores):
    """Make the head see one direction only, in which the given tokens have these scores, whatever came before."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.lm_head.weight.zero_()
        for token, score in scores.items():
            model.lm_head.weight[token, 0] = score


@pytest.mark.parametrize("end", [END, NEW_PARAGRAPH])
def test_beams_stop_at_both_ends(model, end):
    always_answer(model, {end: 50.0})
    prompt = torch.tensor([[1, 2, END]])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=decoding())
    assert ids[0, 3:].tolist() == [end]


def test_repeats_are_banned_in_the_text_but_not_of_the_context():
    prompt, text = [3, 4, 5, 6], [3, 4, 5, 6, 3, 4, 5]
    scores = ban_repeats(len(prompt))(torch.tensor([prompt + text[:3], prompt + text[1:4]]), torch.zeros(2, 10))
    assert not scores.isinf().any()
    scores = ban_repeats(len(prompt))(torch.tensor([prompt + text]), torch.zeros(1, 10))
    assert scores.isinf().nonzero().tolist() == [[0, 6]]


def test_texts_are_generated_in_the_order_of_their_contexts(model, tokenizer):
    # `pub` is by far the likeliest, but a fifth in a row would repeat the first four.
    always_answer(model, {6: 60.0, 7: 50.0, END: 49.0})
    texts = generate(model, tokenizer, ["name : Cotto", "name", "Type : pub | name"], batch_size=2)
    assert len(texts) == 3
    assert all(text.startswith("pub pub pub pub") for text in texts)
    assert not any("pub pub pub pub pub" in text for text in texts)


def test_a_tokenizer_with_an_end_of_its_own(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "."
    assert encode({"context": "name", "completion": "a pub"}, other)["input_ids"] == [1, 7, 5, 6, 7]
    assert generated_text([3, NEW_PARAGRAPH, 7, 5], other) == other.decode([3, NEW_PARAGRAPH])
    assert collate([{"input_ids": [1, 2]}, {"input_ids": [1]}], end=end_of(other))["input_ids"][1].tolist() == [1, 7]
    assert decoding(ends_of(other), longest=9).eos_token_id == [7]
