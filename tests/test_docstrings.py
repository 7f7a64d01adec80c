"""What is printed runs: docstrings, the snippets of README and docs; and every message is explained in docs/faq.md."""

import ast
import doctest
import importlib
import inspect
import operator
import re
from pathlib import Path

import pytest
import torch

import fastopt

ROOT = Path(__file__).parent.parent
FAQ = (ROOT / "docs" / "faq.md").read_text()
WITH_TRITON = ("gpu", "gpu_passes")
MODULES = sorted({path.stem for path in (ROOT / "fastopt").glob("*.py")} - {"__init__", *WITH_TRITON})
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", ["fastopt", *(f"fastopt.{module}" for module in MODULES)])
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed


DOCUMENTED = [name for name in fastopt.__all__ if callable(getattr(fastopt, name)) and name != "backend_info"]
DOCUMENTED += ["swa_utils.AveragedModel", "swa_utils.get_ema_multi_avg_fn"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_docstring_names_every_argument_with_its_default(name):
    """And has an example of its own."""
    cls = operator.attrgetter(name)(fastopt)
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        options = {"params": None, **cls([torch.nn.Parameter(torch.ones(1))]).defaults, "state_dtype": None}
        if name == "AdamW":
            del options["decoupled_weight_decay"]  # no argument of its constructor
    else:
        parameters = inspect.signature(cls).parameters.values()
        options = {p.name: None if p.default is inspect.Parameter.empty else p.default for p in parameters}
    required = [name for name, default in options.items() if default is None and name not in ("foreach", "fused")]
    doc = inspect.getdoc(cls)  # without the indentation, which Python 3.13 takes off when compiling
    arguments = re.search(r"\nArgs:\n(.*?)\n\n", doc, re.S)[1]
    entries = re.findall(r"^ {4}([a-z_0-9, ]+): (.*(?:\n {8}.*)*)", arguments, re.M)
    described = {argument: text for names, text in entries for argument in names.split(", ")}
    assert described.keys() == options.keys()
    for argument, default in options.items():
        if argument in required and "Default" not in described[argument]:
            continue
        said = re.search(r"Default ([^ ]+(?: [^ ]+\))?)[.:](?:$| )", described[argument])
        assert said and ast.literal_eval(said[1]) == default, argument
    assert f"fastopt.{name}(" in doc


# ---- pages


# Blocks of Python that are whole programs: those with a title are files to be edited.
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if ">>>" in code:
        test = doctest.DocTestParser().get_doctest(code, {}, "snippet", None, 0)
        assert not doctest.DocTestRunner().run(test).failed
    else:
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_name_is_there(page):
    """Links, files of this repository, targets of make, modules to run."""
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", re.sub("`.*?`", "", text)):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:fastopt|csrc|kernels|tests|bench|docs|examples)/[\w./]+)`", text):
        assert (ROOT / name).exists() or name.endswith("adadelta.py"), name  # which a reader shall write
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert target in targets, f"make {target}"
    for module in re.findall(r"python -m ((?:tests|bench)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


# ---- messages


def plain(text):
    """Without quoting that markdown or C++ add."""
    return re.sub(r"[`'\"\s]+", " ", text)


INTERNAL = {"no update named", "step(optimizer, fresh)"}  # only a mistake in this library shows them


def messages():
    """The constant parts of every message that the library raises or warns with, as (file, text)."""
    for path in sorted((ROOT / "fastopt").glob("*.py")) + [ROOT / "setup.py"]:
        tree = ast.parse(path.read_text())
        constants = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        raised = [call for call in calls if re.search(r"(Error|exit)$", ast.unparse(call.func)) and call.args]
        for value in [*constants, *(call.args[0] for call in raised)]:
            if isinstance(value, (ast.Constant, ast.JoinedStr)):
                for part in value.values if isinstance(value, ast.JoinedStr) else [value]:
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield from ((path.name, text) for text in re.split(r"\{\w+\}", part.value))
    for path in sorted((ROOT / "csrc").glob("*/*")):
        for statement in re.findall(r"\braise\(PyExc_\w+, (.*?)\);", path.read_text(), re.S):
            joined = re.sub(r'"\s*\n?\s*"', "", statement)
            yield from ((path.name, text) for text in re.findall(r'"([^"]*)"', joined))


def test_every_message_is_explained():
    """Each part of a message that is long enough to be recognised is in a table of docs/faq.md."""
    found = [(file, text) for file, text in messages() if len(text) > 12 and " " in text.strip()]
    assert len(found) > 40
    explained = plain(FAQ) + " ".join(INTERNAL)
    assert [(file, text) for file, text in found if plain(text).strip() not in explained] == []


def test_every_explained_message_exists():
    """The other way round."""
    sources = plain(" ".join(text for _, text in messages()))
    for row in re.findall(r"^\| (`.*?) \| ", FAQ.split("## Questions")[0], re.M):
        for message in re.findall(r"`([^`]+)`", row):
            for part in re.split(r"\.\.\.", message):
                if len(part) > 12:
                    assert plain(part).strip() in sources, part
