"""Makes links of the names in Transformers' docstring style, [`Name`]: to the page of the name, if it has one."""

import re
from typing import Any

import griffe


class LinkNames(griffe.Extension):
    def on_package_loaded(self, *, pkg: griffe.Module, **_: Any) -> None:
        paths = {}
        objects = list(_objects(pkg))
        for item in objects:
            paths.setdefault(item.name, item.path)
            if isinstance(item.parent, griffe.Class):
                paths[f"{item.parent.name}.{item.name}"] = item.path

        def link(match: re.Match) -> str:
            path = paths.get(match[1])
            return f"[`{match[1]}`][{path}]" if path else f"`{match[1]}`"

        for item in objects:
            if item.docstring:
                item.docstring.value = re.sub(r"\[`([\w.]+)`\](?![\[(])", link, item.docstring.value)


def _objects(parent: Any) -> Any:
    """Everything that is defined in a module or class, at any depth."""
    for member in parent.members.values():
        if not member.is_alias:
            yield member
            if member.is_module or member.is_class:
                yield from _objects(member)
