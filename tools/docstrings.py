"""For mkdocstrings: the docstrings, which are written to be read by help(), as Markdown."""

import re
from typing import Any

from griffe import Extension, Object


class Markdown(Extension):
    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"::$", ":", obj.docstring.value, flags=re.M)  # before a block of equations
        head, mark, example = text.partition("\n>>> ")
        if mark:
            lines = (mark.strip() + " " + example).splitlines()
            text = head + "\nExamples:\n" + "\n".join("    " + line for line in lines)
        obj.docstring.value = text
