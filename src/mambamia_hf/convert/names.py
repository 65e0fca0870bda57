"""Names of the tensors, ours and the original layout's, and the check that a checkpoint holds the right ones."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import groupby


Shape = tuple[int, ...]

# From our names of the compressor's tensors to the released ones: rules that apply one after the other.
_COMPRESSOR_RULES = (
    (r"^anchor$", "query_token"),
    (r"^norm\.weight$", "model.norm_f.weight"),
    (r"^layers\.", "model.layers."),
    (r"\.gpa\.weight_proj\.", ".weight_fc."),
    (r"\.gpa\.gate_proj\.", ".gate_fc."),
    (r"\.forward_ssm\.norm$", ".norm.weight"),
    (r"\.forward_ssm\.", "."),
    (r"\.backward_ssm\.norm$", ".norm_b.weight"),
    (r"\.backward_ssm\.conv1d\.", ".conv1d_b."),
    (r"\.backward_ssm\.A_log$", ".A_b_log"),
    (r"\.backward_ssm\.(D|dt_bias)$", r".\1_b"),
)
# Where checkpoints keep a compressor. The last one reads audio: it can be taken alone, but not as part of a model. A
# compressor alone may lack the name of the model around it.
PROJECTORS = ("model.mm_projector.", "model.video_audio_compressor.")
_COMPRESSORS = (*PROJECTORS, "model.mm_audio_projector.")
COMPRESSOR_PREFIXES = (*_COMPRESSORS, *(prefix.removeprefix("model.") for prefix in _COMPRESSORS))
TOWER = "model.vision_tower.vision_tower."
# Buffers that older versions of Transformers saved and the model computes itself.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|embeddings\.position_ids)$")
# What stands before every name of a model that was wrapped when it was saved: by training in parallel, compilation,
# adapters, and a module around it.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")
# The lab's Mamba2 has an embedding for a vocabulary of size 0.
_NO_EMBEDDING = re.compile(r"(^|\.)model\.embeddings\.weight$")
# Names per module that an error message lists before it counts them, and tensors that it shows with their shapes.
_LISTED = 24
_LISTED_SHAPES = 12


def wrapping(names: Collection[str]) -> str:
    """What stands before every name because the model was wrapped when it was saved, as `module.`."""
    found = ""
    while mark := next((mark for mark in _WRAPPERS if _wraps(found + mark, names)), None):
        found += mark
    return found


def original_compressor_name(name: str) -> str:
    """The released name of one of our compressor's tensors."""
    for ours, theirs in _COMPRESSOR_RULES:
        name = re.sub(ours, theirs, name)
    return name


def original_name(name: str, projector: str = PROJECTORS[0], tower: str = f"{TOWER}vision_model.") -> str:
    """The original layout's name of one of our tensors, given the prefixes of the compressor and the vision tower."""
    if name.startswith("model.compressor."):
        return projector + original_compressor_name(name.removeprefix("model.compressor."))
    if name.startswith("model.vision_tower."):
        return tower + name.removeprefix("model.vision_tower.")
    if name == "model.end_of_frame":
        return "model.image_newframe"
    return re.sub(r"^model\.language_model\.", "model.", name)


def projector_prefix(names: Collection[str]) -> str:
    """The prefix under which a whole checkpoint keeps its compressor: that with a `query_token`, or with anything."""
    for mark in ("query_token", ""):
        for prefix in PROJECTORS:
            if any(name.startswith(prefix + mark) for name in names):
                return prefix
    return PROJECTORS[0]


def tower_prefix(names: Collection[str]) -> str:
    """The prefix of the vision tower's tensors, which older versions of Transformers nest one level deeper."""
    nested = f"{TOWER}vision_model."
    return nested if any(name.startswith(nested) for name in names) else TOWER


def is_lone_compressor(names: Collection[str]) -> bool:
    """Whether a checkpoint holds a compressor, with or without a prefix, and nothing else."""
    return any(
        f"{prefix}query_token" in names and all(name.startswith(prefix) for name in names)
        for prefix in (*COMPRESSOR_PREFIXES, "")
    )


def is_mlp(names: Collection[str]) -> bool:
    """Whether names, without their prefix, are those of LLaVA's projectors `linear` and `mlp2x_gelu`."""
    return bool(names) and all(re.fullmatch(r"(\d+\.)?(weight|bias)", name) for name in names)


def numbered(names: Iterable[str], prefix: str) -> set[int]:
    """The numbers of the layers `{prefix}N.` that there are tensors of."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return {int(match[1]) for name in names if (match := pattern.match(name))}


def is_buffer(name: str) -> bool:
    """Whether a name is that of a buffer which the model computes itself."""
    return _BUFFERS.search(name) is not None


def is_empty_embedding(name: str, shape: Shape) -> bool:
    """Whether a tensor is the compressor's embedding of a vocabulary of size 0, which holds no number."""
    return _NO_EMBEDDING.search(name) is not None and shape[:1] == (0,)


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match one of the shell-style `patterns`.

    Raises:
        ValueError: for a pattern that no name matches.
    """
    names, found = list(names), set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"No tensor matches the pattern {pattern!r} to ignore; check its spelling.")
        found |= matches
    return sorted(found)


def listing(names: Iterable[str]) -> str:
    """Names for a message: in full where a module has few of them, else its parts with their numbers of tensors."""
    return ", ".join(_shortened(list(group)) for _, group in groupby(sorted(names), _module))


def ignoring(names: Iterable[str], needed: Iterable[str] = ()) -> str:
    """The command-line option that leaves out the modules of `names`, and nothing that is `needed`."""
    needed = list(needed)
    patterns = sorted({_pattern(name, needed) for name in names})
    return " ".join(["--ignore", *(f"'{pattern}'" for pattern in patterns)])


def check_tensors(
    what: str,
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    optional: Collection[str] = (),
    hint: str = "",
) -> None:
    """Raises an error that names every tensor that is unknown, missing or of a wrong shape.

    Args:
        what: what the tensors are of, for the message.
        found: shapes of the tensors that there are.
        expected: shapes of those that there have to be.
        optional: names that may be missing.
        hint: sentences to close the message with where tensors are unknown or missing.

    Raises:
        ValueError: if the tensors are not those expected.
    """
    unknown, missing = found.keys() - expected.keys(), expected.keys() - found.keys() - set(optional)
    misshapen = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    problems = [
        f"{len(names)} {kind}: {listing(names)}"
        for kind, names in (("unknown", unknown), ("missing", missing))
        if names
    ]
    if misshapen:
        shown = [f"{name} ({found[name]}, expected {expected[name]})" for name in misshapen[:_LISTED_SHAPES]]
        if len(misshapen) > _LISTED_SHAPES:
            shown.append(f"and {len(misshapen) - _LISTED_SHAPES} more")
        problems.append(f"{len(misshapen)} of a wrong shape: {', '.join(shown)}")
    if problems:
        closing = f" {hint}" if (unknown or missing) and hint else ""
        raise ValueError(f"The tensors of {what} do not fit the model. {'; '.join(problems)}.{closing}")


def _module(name: str) -> str:
    """The first two parts of a name, with the dot behind them if there are more."""
    return "".join(re.split(r"(?<=\.)", name)[:2])


def _pattern(name: str, needed: Iterable[str]) -> str:
    """The pattern of the largest module around a name that nothing needed is in; the same module in every layer."""
    patterns = [_module(name) + "*"]
    parts = re.sub(r"\.\d+(?=\.)", ".*", name).split(".")
    patterns += [".".join(parts[:depth]) + ".*" for depth in range(3, len(parts))] + [".".join(parts)]
    free = (pattern for pattern in patterns if not any(fnmatchcase(other, pattern) for other in needed))
    return next(free, name)


def _wraps(prefix: str, names: Collection[str]) -> bool:
    # "model." is part of the layout's own names, if it does not stand there twice.
    is_own = prefix.endswith("model.") and not prefix.endswith("base_model.model.")
    inside = f"{prefix}model." if is_own else prefix
    return all(name.startswith(prefix) for name in names) and any(name.startswith(inside) for name in names)


def _shortened(names: list[str]) -> str:
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        parts = Counter(".".join(name.split(".")[:depth]) for name in names)
        if len(parts) <= _LISTED:
            break
    return ", ".join(part if part in names else f"{part}.* ({number} tensors)" for part, number in parts.items())
