"""The modules of a model, from its config: which weights are matrices of linear layers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmevo.errors import SourceError
from llmevo.models.references import load_pretrained

LINEAR, CONV1D, OTHER = "linear", "conv1d", "other"
"""Kinds of modules: `nn.Linear`; GPT-2's `Conv1D`, whose weight is (inputs, outputs); any other with weights."""


class Modules:
    """The modules of a model that hold weights, by the names that they have in transformers.

    Made from the config alone: the weights are on torch's `meta` device and need no memory.
    """

    def __init__(self, folder: Path, names: Iterable[str], changed: Mapping[str, Any] | None = None) -> None:
        """`names` are those of the checkpoint's tensors, which some models have other names for; `changed` is a config
        to take instead of the one in the folder, of a model of the same class.

        Raises SourceError when transformers cannot build the model.
        """
        from transformers import AutoConfig
        from transformers.pytorch_utils import Conv1D

        # transformers takes seconds to import
        from llmevo.models.conversion import Places, class_of, transformers_config

        config = load_pretrained(AutoConfig, folder)
        if changed is not None:
            config = transformers_config(type(config), changed)
        try:
            with torch.device("meta"):
                model: Any = class_of(config).from_config(config)
        except (ValueError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SourceError(
                f"{folder}: transformers has no language model for its config.json ({reason}), so its linear layers"
                " are not known; export the whole model (without --as)"
            ) from error
        self.names = [name for name, _ in model.named_modules() if name]
        """All modules, those without weights and those that only hold others as well."""
        kinds = {torch.nn.Linear: LINEAR, Conv1D: CONV1D}
        self.kinds: dict[str, str] = {
            name: next((kind for of, kind in kinds.items() if isinstance(module, of)), OTHER)
            for name, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        }
        """The kind of each module, by its name."""
        keys: Any = model._tied_weights_keys
        is_tied = bool(getattr(config, "tie_word_embeddings", False)) and isinstance(keys, dict)
        self.tied = {_module(source): _module(target) for target, source in keys.items()} if is_tied else {}
        """{module: another that has the same weight}, such as embeddings and output head."""
        parts = Places(model, names).parts.items()
        self._targets = {name: _module(part.target) for name, part in parts if part.converter is None}
        self.is_multimodal = config.get_text_config() is not config

    def inside(self, module: str) -> list[str]:
        """Return the modules with weights that a module holds."""
        return [name for name in self.kinds if name.startswith(f"{module}.")]

    def module_of(self, tensor: str) -> str | None:
        """Return the name of the module that holds a tensor of a checkpoint; None where no module has it."""
        return next((name for name in (_module(tensor), self._targets.get(tensor)) if name in self.kinds), None)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
