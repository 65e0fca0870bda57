"""Reads docstrings in Transformers' style: [`Name`] becomes a link to its entry, types of arguments plain text."""

import re
from collections.abc import Iterator
from typing import Any

import griffe


class TransformersDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        objects = list(_objects(pkg))
        paths: dict[str, str] = {}
        for item in objects:
            if item.is_module:
                continue
            paths.setdefault(item.name, item.path)
            if isinstance(item.parent, griffe.Class):
                paths.setdefault(f"{item.parent.name}.{item.name}", item.path)

        def link(match: re.Match) -> str:
            path = paths.get(match[1])
            return f"[`{match[1]}`][{path}]" if path else f"`{match[1]}`"

        for item in objects:
            if item.docstring is not None:
                text = re.sub(r"\[`([\w.]+)`\](?![\[(])", link, item.docstring.value)
                item.docstring.value = re.sub(r"^( *[\w, ]+ \()(.+)(?=\):)", _plain_type, text, flags=re.M)


def _plain_type(match: re.Match) -> str:
    return match[1] + match[2].replace("`", "").replace("*", "")


def _objects(parent: Any) -> Iterator[Any]:
    """Everything that is defined in a module or class, at any depth."""
    for member in parent.members.values():
        if not member.is_alias:
            yield member
            if member.is_module or member.is_class:
                yield from _objects(member)
