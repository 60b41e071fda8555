"""Functions of Python source files, and what their docstrings say of them. Files are parsed, never executed."""

import ast
from collections.abc import Iterator


def documented_functions(text: str) -> Iterator[tuple[str, str]]:
    """The code of each function that has a docstring, without it and blank lines, and the docstring's first line.

    Functions that have nothing but a docstring are left out. Raises SyntaxError.
    """
    lines = text.encode().splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            said = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if said:
                yield _without_docstring(node, lines), said


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[bytes]) -> str:
    """Columns of the syntax tree are those of bytes, lines are counted from 1."""
    docstring = node.body[0]
    assert docstring.end_lineno is not None and docstring.end_col_offset is not None
    code = lines[node.lineno - 1 : docstring.lineno - 1]
    code.append(lines[docstring.lineno - 1][: docstring.col_offset] + b"\n")
    rest = lines[docstring.end_lineno - 1 : node.end_lineno]
    code += [rest[0][docstring.end_col_offset :].lstrip(b"; "), *rest[1:]]
    kept = [line.decode().rstrip() for line in code if line.strip()]
    return "\n".join(line.removeprefix(" " * node.col_offset) for line in kept) + "\n"
