"""Scores of generated text against several references, as the E2E NLG Challenge counts them.

    python recipes/e2e_scores.py --hypotheses generated.txt --references references.txt

One hypothesis a line; the references of each hypothesis in the same order, one a line, a blank line between groups.
These are the files of the e2e-metrics script, and on the challenge's outputs so are the numbers to the four printed
digits. Needs `sacrebleu` and `pycocoevalcap`; METEOR, on request, needs Java too.
"""

import argparse
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu import corpus_bleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a


# Penn Treebank words without punctuation, as pycocoevalcap's Java tokenizer gives them: on every line of the E2E test
# set and of three published outputs for it, and on all but 11 of 60,409 E2E lines.
NOT_WORDS = set(".?!,:;-`'\"()[]{}&") | {"''", "``", "--"}
WORD_RULES = tuple(
    (re.compile(pattern), spaced)
    for pattern, spaced in (
        (r"(?<!\S)(?!st\.)(\S*[^\s.])\.(?=[\"')]*(?:\s|$))", r"\1 . "),  # not in `St. John`, nor in `centre.,`
        (r"[£$?!;:\"()\[\]&]|,(?!\d)|(?<!\d),|/(?!\d)|(?<!\d)/|\.\.+", r" \g<0> "),
        (r"(?<!\S)'(?!(?:s|re|ve|ll|d|m)\b)|'(?!\w)", " ' "),
        (r"(?<=\w)(?:n't|'(?:s|re|ve|ll|d|m))\b", r" \g<0>"),
        (r"--+|-(?!\S)|(?<!\S)[-.](?=[a-z])", r" \g<0> "),
        (r"\bcan(?=not\b)", "can "),
    )
)


def score(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], with_meteor: bool = False
) -> dict[str, float]:
    """All scores of `hypotheses`, each against its own references, of which there may be any number but none.

    `bleu` and `rouge_l` are in [0, 1]; `cider` is in [0, 10] and 0 for a single hypothesis, as a word that is in all
    groups tells nothing. `nist` is that of mteval-v13a, the published one, and `nist_python` that of `-p` in
    e2e-metrics, with which LoRA reports: only their mean lengths of references differ. Case never matters.

    Raises:
        ValueError: no hypotheses, not a group of references for each, an empty group, or METEOR without Java.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise ValueError(
            f"Each hypothesis needs at least one reference: got {len(hypotheses)} hypotheses, {len(references)} groups"
            f" of references, {sum(not group for group in references)} of them empty."
        )
    most = max(map(len, references))
    streams = [[group[place] if place < len(group) else None for group in references] for place in range(most)]
    by_place = {place: [" ".join(words(text)) for text in group] for place, group in enumerate(references)}
    generated = {place: [" ".join(words(text))] for place, text in enumerate(hypotheses)}
    scores = {
        "bleu": corpus_bleu(list(hypotheses), streams, lowercase=True, force=True).score / 100,  # force: no warning
        **nist(hypotheses, references),
        "rouge_l": float(Rouge().compute_score(by_place, generated)[0]),
        "cider": float(Cider().compute_score(by_place, generated)[0]),
    }
    if with_meteor:
        scores["meteor"] = meteor(by_place, generated)
    return scores


def words(text: str) -> list[str]:
    """Lower-cased Penn Treebank words of English text, punctuation left out."""
    text = text.lower()
    for pattern, spaced in WORD_RULES:
        text = pattern.sub(spaced, text)
    return [word for word in text.split() if word not in NOT_WORDS and word.strip(".")]


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]], order: int = 5) -> dict[str, float]:
    """NIST by its definition (mteval-v13a): the information of each matched n-gram, summed over n-gram orders.

    An n-gram's information is log2 of how often its first n - 1 words stand in all references over how often it does.
    By hand, as nltk's `corpus_nist` does not equal the published scorer (7.13 for 8.61).
    """
    tokenize = Tokenizer13a()
    outputs = [tokenize(text.lower()).split() for text in hypotheses]
    groups = [[tokenize(text.lower()).split() for text in group] for group in references]
    everywhere = Counter(gram for group in groups for text in group for gram in ngrams(text, order))
    everywhere[()] = sum(len(text) for group in groups for text in group)
    information, possible = [0.0] * order, [0] * order
    for output, group in zip(outputs, groups, strict=True):
        in_group = Counter()
        for text in group:
            in_group |= Counter(ngrams(text, order))  # the most that any one reference has
        for gram, count in (Counter(ngrams(output, order)) & in_group).items():
            information[len(gram) - 1] += count * math.log2(everywhere[gram[:-1]] / everywhere[gram])
        possible = [total + max(len(output) - place, 0) for place, total in enumerate(possible)]
    total = sum(gained / count for gained, count in zip(information, possible, strict=True) if count)
    length = sum(map(len, outputs))
    over_all = everywhere[()] / (sum(map(len, groups)) / len(groups))
    per_group = sum(sum(map(len, group)) / len(group) for group in groups)
    return {"nist": total * brevity(length, over_all), "nist_python": total * brevity(length, per_group)}


def ngrams(text: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(text[start : start + n]) for n in range(1, order + 1) for start in range(len(text) - n + 1)]


def brevity(length: int, reference_length: float) -> float:
    """NIST's penalty: 1 at the references' length and above it, 1/2 at two thirds of it."""
    ratio = min(length / reference_length, 1.0) if reference_length else 1.0
    return math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2) if ratio else 0.0


def meteor(references: dict[int, list[str]], generated: dict[int, list[str]]) -> float:
    """METEOR 1.5 by the program that comes with pycocoevalcap: no download, about a minute for E2E."""
    if not shutil.which("java"):
        raise ValueError("METEOR needs Java, and there is no `java` on the path: install it or leave METEOR out.")
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(references, generated)[0])


def read_groups(path: str | Path) -> list[list[str]]:
    """Groups of lines with a blank line between two of them."""
    text = Path(path).read_text(encoding="utf-8")
    return [group.splitlines() for group in re.split(r"\n\s*\n", text.strip()) if group]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypotheses", required=True, help="one text a line")
    parser.add_argument("--references", required=True, help="one text a line, a blank line between groups")
    parser.add_argument("--meteor", action="store_true", help="METEOR too; needs Java")
    arguments = parser.parse_args()
    hypotheses = Path(arguments.hypotheses).read_text(encoding="utf-8").splitlines()
    scores = score(hypotheses, read_groups(arguments.references), arguments.meteor)
    print(json.dumps({name: round(value, 4) for name, value in scores.items()}, indent=2))


if __name__ == "__main__":
    main()
