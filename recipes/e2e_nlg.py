"""The E2E NLG data as LoRA's GPT-2 harness uses it: format, labels, groups of references, decoding.

train, validation = load_e2e("trainset.csv"), load_e2e("devset.csv")
train = train.map(lambda row: encode(row, tokenizer), remove_columns=train.column_names)
"""

import gzip
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from datasets import Dataset
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import NoRepeatNGramLogitsProcessor

from read_columns import columns_of_file, columns_of_splits


END, NEW_PARAGRAPH = 50256, 628  # GPT-2's <|endoftext|>, which also parts context from text, and "\n\n"
LONGEST_TEXT, REPEATED = 64, 4  # LoRA's: tokens that are generated, and the length of what may not come twice
IGNORED = -100
COLUMN_NAMES = {"meaning_representation": "mr", "human_reference": "ref"}  # on the Hub -> in the challenge's files
SLOT_NAMES = {"eatType": "Type", "familyFriendly": "family friendly", "priceRange": "price"}
SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")

# LoRA's files have English tokens parted by spaces; these rules give all of its test file. Its validation file was
# parted by another version (`isn 't`, `£ 20- £ 25`, `3 - star`): 71 of its 4,672 texts differ from ours.
TOKEN_RULES = tuple(
    (re.compile(pattern), parted)
    for pattern, parted in (
        (r"\.\.+|[!?;:\"()]|,(?!\d)|(?<!\d),", r" \g<0> "),
        (r"(?<!\S)[£$]", r"\g<0> "),
        (r"(?<!\S)'(?!(?:s|re|ve|ll|d|m)\b)|'(?!\w)", " ' "),
        (r"n't\b|(?<=\w)'(?:s|re|ve|ll|d|m)\b", r" \g<0>"),
        (r"(?<=[^\W\d])-(?=[^\W\d])|(?<=\d)-(?=\d)", r" \g<0> "),  # `family-friendly`, `20-25`; not `5-star`
        (r"(?<=[^\s.])\.(?!\S)|(?<=[a-z])\.(?=[A-Z])", r" \g<0> "),
        (r"\bthats\b", "that s"),
    )
)


def load_e2e(file: str | None = None, dataset_name: str | None = None, split: str = "train") -> Dataset:
    """Columns `context` and `completion`, one row per reference, in the order of the source.

    `file` is a release file of the challenge (.csv, columns `mr` and `ref`) or one of LoRA's (.txt, `context||text`),
    each also .gz. `dataset_name` is a Hub data set with columns `mr` and `ref`, or `meaning_representation` and
    `human_reference`; `split` is read from it.
    """
    if (file is None) == (dataset_name is None):
        raise ValueError(f"Give either `file` or `dataset_name`, got `{file}` and `{dataset_name}`.")
    if file and str(file).removesuffix(".gz").endswith(".txt"):
        with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
            pairs = [line.strip().split("||") for line in lines]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"Each line of `{file}` must read `context||text`; other data must be .csv.")
        return Dataset.from_list([dict(zip(("context", "completion"), pair, strict=True)) for pair in pairs])
    table = columns_of_file(file) if file else columns_of_splits(dataset_name, splits=(split,))[0]
    table = {COLUMN_NAMES.get(name, name): column for name, column in table.items()}
    if not {"mr", "ref"} <= set(table):
        raise ValueError(f"`{file or dataset_name}` must have the columns mr, ref; it has: {', '.join(table)}.")
    context, completion = map(linearise, table["mr"]), map(part_tokens, table["ref"])
    return Dataset.from_dict({"context": list(context), "completion": list(completion)})


def linearise(meaning: str) -> str:
    """`name[Cotto], eatType[pub]` as `name : Cotto | Type : pub`."""
    if not (slots := [(name.strip(), value) for name, value in SLOT.findall(meaning)]):
        raise ValueError(f"A meaning representation must read `name[value], name[value]`, got `{meaning}`.")
    return " | ".join(f"{SLOT_NAMES.get(name, name)} : {part_tokens(value)}" for name, value in slots)


def part_tokens(text: str) -> str:
    """Spaces around punctuation and before `'s` and `n't`, as in LoRA's files."""
    for pattern, parted in TOKEN_RULES:
        text = pattern.sub(parted, text)
    return " ".join(text.split())


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends contexts and texts: GPT-2's, unless the tokenizer has an end of its own."""
    return END if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def ends_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a generated text; other tokenizers than GPT-2's may spell a blank line in several tokens."""
    end = end_of(tokenizer)
    return [END, NEW_PARAGRAPH] if end == END else [end]


def encode_context(context: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model is given: the context and <|endoftext|>."""
    return [*tokenizer(context, add_special_tokens=False)["input_ids"], end_of(tokenizer)]


def encode(row: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> dict:
    """`input_ids` and `labels`: context, <|endoftext|>, text, <|endoftext|>; labels are -100 up to the text.

    Labels are not shifted: Transformers' models do that. Cut at the end to `max_length`.
    """
    context = encode_context(row["context"], tokenizer)
    text = [*tokenizer(" " + row["completion"], add_special_tokens=False)["input_ids"], end_of(tokenizer)]
    labels = [IGNORED] * len(context) + text
    return {"input_ids": (context + text)[:max_length], "labels": labels[:max_length]}


def collate(rows: Sequence[Mapping[str, list[int]]], side: str = "right", end: int = END) -> dict[str, torch.Tensor]:
    """Pad to the longest row: labels with -100, ids with <|endoftext|>, which the attention mask hides.

    LoRA pads to 512 with id 0, always on the right: the loss is the same. To generate, pad on the `left`.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(lists: Sequence[list[int]], value: int) -> torch.Tensor:
        fills = [[value] * (longest - len(ids)) for ids in lists]
        return torch.tensor([f + ids if side == "left" else ids + f for f, ids in zip(fills, lists, strict=True)])

    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": padded(ids, end), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    return batch | ({"labels": padded([row["labels"] for row in rows], IGNORED)} if "labels" in rows[0] else {})


def group_references(data: Dataset) -> dict[str, list[str]]:
    """Each distinct context with all its texts, in order of first sight: one hypothesis is made per context."""
    groups = {}
    for context, text in zip(data["context"], data["completion"], strict=True):
        groups.setdefault(context, []).append(text)
    return groups


def decoding(ends: Sequence[int] = (END, NEW_PARAGRAPH), longest: int = LONGEST_TEXT) -> GenerationConfig:
    """LoRA's beam search, which goes on until nothing can become better. Its ban on repeats is `ban_repeats`."""
    beams = {"num_beams": 10, "length_penalty": 0.8, "early_stopping": "never", "renormalize_logits": True}
    tokens = {"eos_token_id": list(ends), "pad_token_id": ends[0]}
    return GenerationConfig(max_new_tokens=longest, do_sample=False, **beams, **tokens)


def ban_repeats(prompt_length: int, size: int = REPEATED) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """No 4-gram twice in the generated text. `no_repeat_ngram_size` counts the prompt's too, so that a text could not
    say `5 out of 5` or a long name of its context; LoRA's harness does not."""
    ban = NoRepeatNGramLogitsProcessor(size)
    return lambda input_ids, scores: ban(input_ids[:, prompt_length:], scores)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    batch_size: int = 8,
    longest: int = LONGEST_TEXT,
    repeated: int = REPEATED,
) -> list[str]:
    """One text for each context, decoded as LoRA does.

    `longest` and `repeated` are in tokens: give more where the tokenizer's are shorter than GPT-2's.
    """
    texts, ends = [], ends_of(tokenizer)
    for start in range(0, len(contexts), batch_size):
        rows = [{"input_ids": encode_context(text, tokenizer)} for text in contexts[start : start + batch_size]]
        batch = {name: ids.to(model.device) for name, ids in collate(rows, "left", ends[0]).items()}
        length = batch["input_ids"].shape[1]
        banned = LogitsProcessorList([ban_repeats(length, repeated)])
        generated = model.generate(**batch, generation_config=decoding(ends, longest), logits_processor=banned)
        texts += [generated_text(ids[length:].tolist(), tokenizer) for ids in generated]
    return texts


def generated_text(new_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of generated ids (without the context), cut before the first end."""
    ends = ends_of(tokenizer)
    end = next((place for place, token in enumerate(new_ids) if int(token) in ends), len(new_ids))
    return tokenizer.decode(new_ids[:end]).split("\n\n")[0].strip()
