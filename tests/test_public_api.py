"""What a user can import by name, and what importing costs."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

PACKAGES = ("interp", "heads", "patching", "probes", "interp.recipe")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, f"{package}.{name} has no docstring"


def test_importing_the_packages_imports_no_torch():
    code = (
        "import sys, interp, heads, patching, probes, app; "
        "heavy = {'torch', 'transformers', 'plotly', 'pandas', 'dash', 'transformer_lens'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_hides_a_public_name(package):
    module = importlib.import_module(package)
    files = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert not files & set(module.__all__)  # importing the file would put it in the name's place
