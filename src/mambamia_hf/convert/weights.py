"""Weights files: what they hold is checked before it is read, and they are read and written one shard at a time."""

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_files import explained, read_index
from ..finite import check_finite
from .names import Shape, listing, wrapping


# The types that weights come in, under safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What LLaVA's first stage of training writes: the compressor alone.
_COMPRESSOR_ALONE = "mm_projector.bin"

# What to say of tensors that are not finite.
DAMAGED = "the checkpoint is damaged or its training diverged"


class StoredTensor(NamedTuple):
    """A tensor in a weights file, whose data has not been read."""

    file: Path
    name: str
    shape: Shape
    dtype: str  # as safetensors calls it, or as torch does where the type is none of weights


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, file by file, from safetensors or .bin files with or without an index.

    Names are without what wrapped the model when it was saved.

    Raises:
        ValueError: if files are missing, damaged, outside `folder`, or contradict their index or each other.
    """
    files, weight_map = _weights_files(folder)
    weights: dict[str, StoredTensor] = {}
    twice = set()
    for file in files:
        for name, tensor in _read_headers(file).items():
            if name in weights:
                twice.add(name)
            weights[name] = tensor
    if twice:
        raise ValueError(f"These tensors are in more than one weights file of {folder}: {listing(twice)}.")
    misplaced = {name for name, file in weight_map.items() if name not in weights or weights[name].file != file}
    if misplaced:
        raise ValueError(
            f"The index of {folder} names tensors that are not in the files it gives for them: {listing(misplaced)}."
        )
    if not weights:
        raise ValueError(f"The weights files of {folder} hold no tensors.")
    wrapped = wrapping(weights)
    return {name.removeprefix(wrapped): tensor for name, tensor in weights.items()}


def check_types(dtypes: Mapping[str, str]) -> None:
    """Raises an error that names the tensors of a type other than those of weights.

    Args:
        dtypes: safetensors' names of the types of the tensors.

    Raises:
        ValueError: for integers, complex numbers, quantised weights and the like.
    """
    wrong = {name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES}
    if wrong:
        raise ValueError(
            f"Weights are stored as {', '.join(DTYPES)}; these tensors are {', '.join(sorted(set(wrong.values())))}: "
            f"{listing(wrong)}."
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a type of weights; torch's name of any other type."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The data of tensors, under the keys of `stored`, read where they are used, through memory maps."""
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(tensor.file for tensor in stored.values()):
        names = {key: tensor.name for key, tensor in stored.items() if tensor.file == file}
        if file.suffix == ".safetensors":
            with _reading(file), safe_open(file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(name) for key, name in names.items()}
        else:
            loaded = _load_pickle(file)
            tensors |= {key: loaded[name] for key, name in names.items()}
    return {key: tensors[key] for key in stored}


def write_weights(weights: Mapping[str, StoredTensor | Tensor], folder: Path, max_shard_size: int) -> None:
    """Writes tensors as safetensors files, with an index if there are several.

    Args:
        weights: the tensors under their new names; stored ones are read when their shard is written.
        folder: where to write.
        max_shard_size: largest size of a file, in bytes.

    Raises:
        ValueError: if a tensor holds NaN or infinite values.
        OSError: if a file cannot be written.
    """
    sizes = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        if isinstance(tensor, StoredTensor)
        else tensor
        for name, tensor in weights.items()
    }
    plan = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        _write_shard({name: weights[name] for name in names}, folder / file)
    if plan.is_sharded:
        total_parameters = sum(math.prod(tensor.shape) for tensor in weights.values())
        index = {
            "metadata": {**plan.metadata, "total_parameters": total_parameters},
            "weight_map": plan.tensor_to_filename,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(weights: Mapping[str, StoredTensor | Tensor], file: Path) -> None:
    stored = {name: tensor for name, tensor in weights.items() if isinstance(tensor, StoredTensor)}
    made = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    tensors: dict[str, Tensor] = {}
    pointers = set()
    for name, tensor in {**read_tensors(stored), **made}.items():
        check_finite(stored[name].name if name in stored else name, tensor, DAMAGED)
        tensor = tensor.contiguous()
        # Tied tensors of a .bin file share their memory, which safetensors does not allow.
        tensors[name] = tensor.clone() if tensor.data_ptr() in pointers else tensor
        pointers.add(tensor.data_ptr())
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written ({error}); is the disk full?") from error


def _weights_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weights files of a checkpoint, and where its index, if there is one, places each tensor."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (LoRA); merge it into its model with the code that trained it and convert the "
            f"result, without adapter_config.json."
        )
    for name in ("model.safetensors", "pytorch_model.bin", _COMPRESSOR_ALONE):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file() and index.is_file():
            raise ValueError(f"{folder} holds both {file.name} and {index.name}; remove the one that is out of date.")
        if file.is_file():
            return [file], {}
        if index.is_file():
            weight_map = read_index(index)
            return sorted(set(weight_map.values())), weight_map
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor their index.")


def _read_headers(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        with _reading(file), safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {
                name: StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    return {
        name: StoredTensor(file, name, tuple(tensor.shape), dtype_name(tensor.dtype))
        for name, tensor in _load_pickle(file).items()
    }


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, memory-mapped."""
    with _reading(file):
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        for name, tensor in tensors.items()
    ):
        raise ValueError(f"{file} holds something other than named tensors; expected a state dict.")
    return tensors


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    with explained(f"{file} is damaged, or holds Python objects other than tensors, which are never loaded"):
        yield
