"""The package's docstrings are Markdown with sections as Hugging Face writes them; autodoc reads reStructuredText."""

import re


REFERENCE = re.compile(r"\[`~?(?P<name>[\w.()]+)`\]")
CODE = re.compile(r"(?<![`:\w])`(?P<code>[^`\n]+)`(?!`)")
LINK = re.compile(r"\[(?P<text>[^\]`]+)\]\((?P<address>https?:[^)]+)\)")


def to_rest(lines: list[str]) -> list[str]:
    """Fenced code, code spans and links of Markdown, in reStructuredText; the rest is the same in both."""
    result, indent = [], None
    for line in lines:
        fence = re.match(r"(\s*)```(\w*)", line)
        if fence and indent is None:
            indent = fence[1]
            language = {"py": "python", "": "text"}.get(fence[2], fence[2])
            result += ["", f"{indent}.. code-block:: {language}", ""]
        elif fence:
            indent = None
            result.append("")
        elif indent is not None:
            result.append(f"    {line}")
        else:
            line = REFERENCE.sub(lambda m: f"``{m['name'].rpartition('.')[2]}``", line)
            line = LINK.sub(lambda m: f"`{m['text']} <{m['address']}>`__", line)
            result.append(CODE.sub(lambda m: f"``{m['code']}``", line) if "`__" not in line else line)
    return result


def _on_docstring(app, what, name, obj, options, lines):
    lines[:] = to_rest(lines)


def setup(app):
    # before napoleon, which takes `name (type):` apart
    app.connect("autodoc-process-docstring", _on_docstring, priority=100)
    return {"parallel_read_safe": True}
