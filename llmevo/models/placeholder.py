"""A model folder whose weights are all zero, for engines that start from a folder and replace every weight.

Quantized and pickled models, and views of models that no folder holds, get one. It takes next to no room on disk.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmevo.models.files import cache_folder, partial_folder, rename_once
from llmevo.models.safetensors_writer import SAFETENSORS_TYPES


def placeholder(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> Path:
    """Return a folder in the cache with this config.json and zeros of these shapes and types; written the first time.

    Raises OSError. The file of the zeros is sparse: it has its full length and no content.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": SAFETENSORS_TYPES[dtypes[name]], "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(config, indent=2) + "\n"
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    out = cache_folder() / "placeholders" / hashlib.sha256(text.encode() + content).hexdigest()[:24]
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out) as partial:
            (partial / "config.json").write_text(text)
            with (partial / "model.safetensors").open("wb") as file:
                file.write(len(content).to_bytes(8, "little") + content)
                file.truncate(8 + len(content) + end)
            rename_once(partial, out)
    return out
