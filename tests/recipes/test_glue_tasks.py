"""The GLUE table on tiny files laid out as GLUE's own, and on files with a header row."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import EvalPrediction

from glue_tasks import TASKS, compute_metrics, label_names, load_task


RECIPES = Path(__file__).parents[2] / "recipes"
MNLI_HEADER = "index\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"


def load_text(tmp_path, task_name, text, suffix=".tsv"):
    path = tmp_path / f"data{suffix}"
    path.write_text(text, encoding="utf-8", newline="")
    return load_task(task_name, str(path), str(path))[1]


@pytest.mark.parametrize(
    ("task_name", "text", "rows"),
    [
        (
            "cola",
            'gj04\t1\t\tHe said "go.\ngj04\t0\t*\tHe go said.',
            [('He said "go.', None, 1), ("He go said.", None, 0)],
        ),
        ("cola", "sentence\tlabel\nHe left.\t1\n", [("He left.", None, 1)]),
        ("mnli", MNLI_HEADER + "0\tx\t(a)\ta\tb\tneutral\tcontradiction\n", [("a", "b", 2)]),
        ("mrpc", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t"a\tb\n', [('"a', "b", 1)]),
        ("qnli", "index\tquestion\tsentence\tlabel\n0\twho?\tme\tentailment\n", [("who?", "me", 0)]),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta?\tb?\t1\n", [("a?", "b?", 1)]),
        ("rte", "index\tsentence1\tsentence2\tlabel\r\n0\ta\tb\tnot_entailment\r\n", [("a", "b", 1)]),
        ("sst2", "sentence\tlabel\nfine \t1\npoor \t0\n", [("fine ", None, 1), ("poor ", None, 0)]),
        ("stsb", "index\tsource1\tsentence1\tsentence2\tscore\n0\tn\ta\tb\t2.5\n", [("a", "b", 2.5)]),
        ("wnli", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", [("a", "b", 1)]),
    ],
)
def test_release_layouts(tmp_path, task_name, text, rows):
    data = load_text(tmp_path, task_name, text)
    assert [(row["text"], row.get("text_pair"), row["label"]) for row in data] == rows
    assert label_names(data) == list(TASKS[task_name].labels)


def test_stsb_csv_is_tab_separated_without_header_and_with_columns_to_spare(tmp_path):
    text = 'cap\tMSRvid\t2012\t0001\t5.000\tA "plane.\tB, c.\ncap\tMSRvid\t2012\t0004\t3.800\td\te\tmore\tand more\n'
    data = load_text(tmp_path, "stsb", text, suffix=".csv")
    assert data["text"][:] == ['A "plane.', "d"]
    assert data["text_pair"][:] == ["B, c.", "e"]
    assert data["label"][:] == pytest.approx([5.0, 3.8])


def test_entailment_is_class_0_in_rte_and_class_1_in_wnli(tmp_path):
    text = "sentence1\tsentence2\tlabel\na\tb\tentailment\n"
    assert load_text(tmp_path, "rte", text)["label"][:] == [0]
    assert load_text(tmp_path, "wnli", text)["label"][:] == [1]


def test_csv_keeps_quoted_commas_and_line_breaks(tmp_path):
    data = load_text(tmp_path, "sst2", 'label,sentence\n0,"dull, ""so""\ndull"\n', suffix=".csv")
    assert data[:] == {"text": ['dull, "so"\ndull'], "label": [0]}


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"sentence1": "a", "sentence2": "b", "label": 1}).encode()))
    assert load_task("mrpc", str(path), str(path))[0][:] == {"text": ["a"], "text_pair": ["b"], "label": [1]}


def test_rows_with_too_few_columns_are_left_out_with_a_warning(tmp_path):
    text = "id\tquestion1\tquestion2\tis_duplicate\n0\ta?\n1\tb?\tc?\t0\n"
    with pytest.warns(UserWarning, match="left out 1 rows"):
        data = load_text(tmp_path, "qqp", text)
    assert data["text"][:] == ["b?"]


def test_a_data_set_of_ones_own_numbers_its_labels_in_order(tmp_path):
    data = load_text(tmp_path, None, "text\tlabel\na\t10\nb\t2\nc\t1\n")
    assert label_names(data) == ["1", "2", "10"]
    assert data["label"][:] == [2, 1, 0]


def test_a_data_set_by_name_is_read_by_its_splits(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for split, label in (("train", "negative"), ("validation", "positive")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"sentence": split, "label": label}))
    train, validation = load_task("sst2", dataset_name=str(tmp_path))
    assert train[:] == {"text": ["train"], "label": [0]}
    assert validation[:] == {"text": ["validation"], "label": [1]}
    with pytest.raises(ValueError, match="no split `validation_matched`; it has: train, validation"):
        load_task("mnli", dataset_name=str(tmp_path))


def test_class_labels_are_matched_by_name(tmp_path, monkeypatch):
    # The other data set calls entailment 1, the task calls it 0.
    features = Features(dict.fromkeys(("sentence1", "sentence2"), Value("string")))
    features["label"] = ClassLabel(names=["not_entailment", "entailment"])
    split = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [1]}, features=features)
    monkeypatch.setattr("read_columns.load_dataset", lambda name: {"train": split, "validation": split})
    assert load_task("rte", dataset_name="me/rte")[0]["label"][:] == [0]


def test_the_sample_in_the_repository_is_balanced_and_disjoint():
    files = [str(RECIPES / f"data/sentence_polarity_{split}.jsonl.gz") for split in ("train", "validation")]
    train, validation = load_task(None, *files)
    assert (len(train), sum(train["label"]), len(validation), sum(validation["label"])) == (6000, 3000, 1500, 750)
    assert len({*train["text"], *validation["text"]}) == 7500


def test_max_train_samples_takes_a_seeded_random_subset(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"sentence {number}\t{number % 2}\n" for number in range(50)))

    def drawn(seed):
        train, validation = load_task("sst2", str(path), str(path), max_train_samples=10, seed=seed)
        assert len(validation) == 50
        return train["text"][:]

    assert len(set(drawn(0))) == 10
    assert drawn(0) == drawn(0)
    assert set(drawn(0)) != set(drawn(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_name": "sst"}, "Unknown GLUE task `sst`. Choose one of: cola, mnli"),
        ({}, "Nothing to load"),
        ({"task_name": "rte", "train_file": "a.tsv"}, "together"),
        ({"train_file": "a.tsv", "validation_file": "b.tsv", "dataset_name": "c"}, "not a mixture"),
        ({"max_train_samples": 0, "task_name": "rte"}, "`max_train_samples` must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(**arguments)


@pytest.mark.parametrize(
    ("task_name", "text", "message"),
    [
        ("rte", "index\tsentence1\tsentence2\n0\ta\tb\n", "sentence1, sentence2, label; it has: index, sentence1"),
        ("cola", "index\tsentence\n0\ta\n", "columns sentence, label; it has: index, sentence"),
        ("sst2", "", "it has: none"),
        ("sst2", "sentence\tlabel\n", "has no rows"),
        ("wnli", "sentence1\tsentence2\tlabel\na\tb\t2\n", "must be one of not_entailment, entailment, 0, 1; got `2`"),
        (None, "body\tlabel\na\t1\n", "columns text, label; it has: body, label"),
    ],
)
def test_files_that_do_not_fit_the_task(tmp_path, task_name, text, message):
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path, task_name, text)


# Predicted classes 1, 1, 0, 1 against 1, 0, 0, 1: two hits, one false alarm, one right refusal.
# Matthews = (2 * 1 - 1 * 0) / sqrt((2 + 1) * (2 + 0) * (1 + 1) * (1 + 0)) = 2 / sqrt(12).
@pytest.mark.parametrize(
    ("task_name", "expected"),
    [
        (None, {"accuracy": 0.75}),
        ("sst2", {"accuracy": 0.75}),
        ("mrpc", {"f1": 0.8, "accuracy": 0.75}),
        ("cola", {"matthews": 2 / 12**0.5}),
    ],
)
def test_classification_metrics(task_name, expected):
    logits = np.array([[0.1, 0.9], [-2.0, 0.0], [3.0, 1.0], [0.0, 5.0]])
    prediction = EvalPrediction(predictions=(logits, "hidden states"), label_ids=np.array([1, 0, 0, 1]))
    assert compute_metrics(task_name)(prediction) == pytest.approx(expected)


def test_regression_metrics():
    # Deviations (-1, 0, 1) against (-2, -1, 3): Pearson = 5 / sqrt(2 * 14); the order is the same, so Spearman = 1.
    prediction = EvalPrediction(predictions=np.array([[0.0], [1.0], [5.0]]), label_ids=np.array([1.0, 2.0, 3.0]))
    assert compute_metrics("stsb")(prediction) == pytest.approx({"pearson": 5 / 28**0.5, "spearman": 1.0})
