"""A package that seems to be installed, or not."""

import importlib.util


def pretend(monkeypatch, package, installed):
    """Of `package` alone: what Transformers asks meanwhile about others, it remembers for the whole process."""
    find_spec = importlib.util.find_spec

    def found(name, *arguments):
        if name != package:
            return find_spec(name, *arguments)
        return "a spec" if installed else None

    monkeypatch.setattr(importlib.util, "find_spec", found)
