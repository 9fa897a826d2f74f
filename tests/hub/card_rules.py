"""What the Hub asks of the metadata at the head of a model card; a commit with another one is refused."""

import re

import yaml


# The Hub's own expression for where the metadata is.
BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def card_metadata(text: str) -> dict:
    """The metadata of a card; nothing if it has none.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    match = BLOCK.match(text)
    return (yaml.safe_load(match[2]) or {}) if match else {}


def card_problems(text: str) -> list[str]:
    """Why the Hub would refuse a card, as its documentation has the rules; empty if it would not."""
    try:
        data = card_metadata(text)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    problems = []
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not REPOSITORY.fullmatch(base):
            problems.append(f'"base_model" must be a repository, got {base!r}')
    if not isinstance(data.get("license", ""), str):
        problems.append('"license" must be a string')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be a list of strings')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            problems.append('"model-index[].name" must be a string')
        for result in model.get("results", []):
            problems += _result_problems(result)
    return problems


def _result_problems(result: dict) -> list[str]:
    problems = []
    for part, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
        for name in needed:
            if not isinstance(result.get(part, {}).get(name), str):
                problems.append(f'"model-index[].results[].{part}.{name}" must be a string')
    for metric in result.get("metrics", [{}]):
        if not isinstance(metric.get("type"), str) or "value" not in metric:
            problems.append('"model-index[].results[].metrics[]" must have a type and a value')
    return problems
