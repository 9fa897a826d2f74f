"""What `from sparse_hf import ...` promises."""

import inspect
import subprocess
import sys

import pytest

import sparse_hf


def test_all_is_sorted_and_without_doubles():
    assert list(sparse_hf.__all__) == sorted(set(sparse_hf.__all__))


def test_dir_lists_every_public_name():
    assert set(sparse_hf.__all__) <= set(dir(sparse_hf))


@pytest.mark.parametrize("name", sparse_hf.__all__)
def test_public_name_can_be_imported(name):
    assert getattr(sparse_hf, name) is not None


@pytest.mark.parametrize("name", sparse_hf.__all__)
def test_public_class_or_function_is_documented(name):
    public = getattr(sparse_hf, name)
    if inspect.isclass(public) or callable(public):
        # A dataclass without a docstring gets its signature as one; that documents nothing.
        written = (public.__doc__ or "").strip()
        assert written
        assert not written.startswith(f"{name}(")


@pytest.mark.parametrize("name", sparse_hf.__all__)
def test_public_methods_are_documented(name):
    public = getattr(sparse_hf, name)
    if inspect.isclass(public):
        own = [method for method in vars(public) if not method.startswith("_")]
        methods = [method for method in own if inspect.isroutine(getattr(public, method))]
        assert [method for method in methods if not inspect.getdoc(getattr(public, method))] == []


def test_import_teaches_the_auto_classes_slim_models_and_loads_nothing_optional():
    code = (
        "import sys, sparse_hf\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('slim_bert')).__name__ == 'SlimBertConfig'\n"
        "print([name for name in ('matplotlib', 'typer', 'trl', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
