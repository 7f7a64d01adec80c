"""docs/features.md names tests that exist, and leaves out none of the files it is about."""

import ast
import re
from pathlib import Path

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
