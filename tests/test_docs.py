"""docs/features.md names tests that exist, and leaves out none of the files it is about; docs/api.md has every name."""

import ast
import inspect
import operator
import re
from pathlib import Path

import torch

import fastopt

from .optimizers import OWN_OPTIONS

TESTS = Path(__file__).parent
COMPLETE = ("dropin", "clients", "checkpoints", "compile", "distributed", "frameworks", "memory")


def test_features_and_tests():
    page = (TESTS.parent / "docs" / "features.md").read_text()
    named = set(re.findall(r"(test_\w+\.py)::(test_\w+)", page))
    existing = {
        (path.name, node.name)
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert named and named <= existing, named - existing
    expected = {test for test in existing if test[0] in {f"test_{name}.py" for name in COMPLETE}}
    assert expected <= named, expected - named


def test_api_page():
    """docs/api.md renders every public name, below a call with the arguments and defaults that it has here.

    Those that every optimizer has beside torch's stand on the page once.
    """
    page = (TESTS.parent / "docs" / "api.md").read_text()
    entries = re.findall(r"^##(#?) (\w+)\n\n```py\n(\w+)(\(.*?\))\n```\n\n::: fastopt\.([\w.]+)$", page, re.M | re.S)
    modules = {name for name in fastopt.__all__ if inspect.ismodule(getattr(fastopt, name))}
    names = set(fastopt.__all__) - modules
    for module in modules:
        within = vars(getattr(fastopt, module))
        own = [name for name in within["__all__"] if getattr(within.get(name), "__module__", "").startswith("fastopt")]
        names |= {f"{module}.{name}" for name in own}
    assert {rendered for *_, rendered in entries} == names and len(entries) == len({*entries})
    assert page.count("\n::: ") == len(entries), "something is rendered without its name and call above it"
    assert all(f"fastopt.{name}" in page for name in modules)
    own = ", ".join(f"{key}={value}" for key, value in OWN_OPTIONS.items())
    assert own in page.replace("\n", " ")
    for deeper, name, called, arguments, rendered in entries:
        assert name == called == rendered.rpartition(".")[2] and bool(deeper) == ("." in rendered)
        written = ast.parse(f"def f{arguments}: pass").body[0].args
        variable = [written.vararg] if written.vararg else []
        positional, keyword = [arg.arg for arg in written.args + variable], [arg.arg for arg in written.kwonlyargs]
        defaults = [ast.literal_eval(value) for value in written.defaults + written.kw_defaults]
        with_default = (positional + keyword)[-len(defaults) :] if defaults else []
        parameters = inspect.signature(operator.attrgetter(rendered)(fastopt)).parameters
        if hasattr(torch.optim, name):
            parameters = {key: value for key, value in parameters.items() if key not in OWN_OPTIONS}
        assert positional + keyword == list(parameters)
        assert keyword == [key for key, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY]
        assert dict(zip(with_default, defaults, strict=True)) == {
            key: parameter.default for key, parameter in parameters.items() if parameter.default is not parameter.empty
        }
