"""The scores on cases small enough to work by hand."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest


pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap")

from e2e_scores import brevity, nist, read_groups, score, words


RECIPE = Path(__file__).parents[2] / "recipes" / "e2e_scores.py"


def test_a_reference_repeated_scores_the_most_whatever_its_case():
    texts = ["Cotto is a cheap pub .", "The Mill serves good Italian food ."]
    scores = score([text.upper() for text in texts], [[texts[0], "Another text ."], [texts[1]]])
    assert scores["bleu"] == pytest.approx(1.0)
    assert scores["rouge_l"] == pytest.approx(1.0)
    # Full likeness is 10 for each reference; that to the other one of the first pair is 0.
    assert scores["cider"] == pytest.approx((10 / 2 + 10) / 2)


def test_bleu_takes_references_of_any_number_by_hypothesis():
    # Matches of the orders 1 to 4: 5 of 6, 4 of 5, 3 of 4, 2 of 3; as long as its reference.
    bleu = score(["a b c d e x"], [["a b c d e f"]])["bleu"]
    assert bleu == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert score(["a b c d e x"], [["a b c d e f", "a b c d e x"]])["bleu"] == pytest.approx(1.0)


def test_rouge_l_is_the_f_of_the_longest_common_subsequence():
    # `a c` is common: precision 2/2, recall 2/4, beta 1.2.
    expected = (1 + 1.44) * 1.0 * 0.5 / (0.5 + 1.44 * 1.0)
    assert score(["a c"], [["a b c d"]])["rouge_l"] == pytest.approx(expected)


def test_nist_by_hand():
    # Six reference words. a and b twice: log2(6/2) bits; c and d once: log2(6). `a b` twice where a is twice: 0 bits;
    # `b c` once where b is twice: 1 bit, and `a b c` after `a b` twice: 1 bit.
    scores = nist(["a b c"], [["a b c", "a b d"]])
    unigrams, bigrams, trigrams = (2 * math.log2(3) + math.log2(6)) / 3, (0 + 1) / 2, 1 / 1
    assert scores["nist"] == pytest.approx(unigrams + bigrams + trigrams)
    assert scores["nist_python"] == pytest.approx(scores["nist"])


def test_nist_takes_the_most_of_any_one_reference():
    # `a` may match twice, as in the second reference, not three times. Information: log2(4 / 3) each.
    assert nist(["a a a"], [["b", "a a"], ["a"]][:1])["nist"] == pytest.approx(
        2 * math.log2(3 / 2) / 3 + math.log2(2) / 2
    )


def test_the_two_nist_scores_differ_in_the_mean_length_of_references():
    # Four hypothesis words. Lengths 6, 6 and 2: over all 14 / 1.5 = 9.33, by group 6 + 2 = 8.
    scores = nist(["a b", "c d"], [["a b e f g h", "a b e f g h"], ["c d"]])
    assert scores["nist"] / scores["nist_python"] == pytest.approx(brevity(4, 14 / 1.5) / brevity(4, 8))


def test_brevity_is_a_half_at_two_thirds():
    assert brevity(4, 6) == pytest.approx(0.5)
    assert brevity(7, 6) == 1
    assert brevity(0, 6) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's near St. John's, in the city centre.", "it 's near st. john 's in the city centre"),
        ("The 'Cotto' isn't family-friendly; £20-£25...", "the cotto is n't family-friendly £ 20 £ 25"),
        ("It 's 5 out of 5 . Cannot - say", "it 's 5 out of 5 can not say"),
        ("In the city center., near it. costs £30.99", "in the city center. near it costs £ 30.99"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_penn_treebank_without_punctuation(text, expected):
    assert words(text) == expected.split()


def test_no_words_at_all_score_zero():
    scores = score(["", ""], [["a b"], ["c"]])
    assert scores == dict.fromkeys(("bleu", "nist", "nist_python", "rouge_l", "cider"), 0)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "got 0 hypotheses"),
        (["a"], [["a"], ["b"]], "got 1 hypotheses, 2 groups"),
        (["a", "b"], [["a"], []], "1 of them empty"),
    ],
)
def test_references_that_do_not_fit(hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        score(hypotheses, references)


def test_meteor_without_java_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="METEOR needs Java"):
        score(["a"], [["a"]], with_meteor=True)


def test_the_command_reads_groups_parted_by_blank_lines(tmp_path, monkeypatch, capsys):
    hypotheses, references = tmp_path / "hypotheses.txt", tmp_path / "references.txt"
    hypotheses.write_text("a b c d\ne f g h\n")
    references.write_text("a b c d\nx\n\ne f g h\n\n")
    assert read_groups(references) == [["a b c d", "x"], ["e f g h"]]
    words = [str(RECIPE), "--hypotheses", str(hypotheses), "--references", str(references)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert json.loads(capsys.readouterr().out)["bleu"] == 1.0
