"""Model references, as users write them, and the folders they stand for.

A reference is `MODEL[@REVISION][+ADAPTER[@REVISION]]`, as mergekit writes it, where MODEL is

- a folder in Hugging Face format, or a GGUF file (relative to the file that names it),
- a model of the Hugging Face hub (`HuggingFaceTB/SmolLM2-135M`), or a GGUF file in one (`owner/name/file.gguf`),
- `package:NAME/FILE`, a file that a Python package carries,

and ADAPTER is a LoRA adapter's folder or hub id. `MODEL[@REVISION]#expert=3` is an expert of a mixture of experts, as a
dense model.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core.core_schema import CoreSchema, to_string_ser_schema

from llmevo.errors import SourceError
from llmevo.models.files import cache_folder, content_checksums, partial_folder, rename_once

PACKAGE = "package:"
EXPERT = "#expert="
"""What stands between a mixture of experts and the number of one of its experts."""

LOADED = {
    "AutoTokenizer": "its tokenizer",
    "AutoConfig": "config.json",
    "GenerationConfig": "its generation config",
}
"""The contents that transformers' automatic classes load, other than the model."""


class ModelPath(BaseModel):
    """A model or an adapter: a path, hub id or package file, and the revision of a hub id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    revision: str | None = None
    expert: int | None = None
    """The expert of each layer, from 0, for one expert of a mixture."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            whole, marked, expert = value.partition(EXPERT)
            if marked and not (expert.isascii() and expert.isdigit()):
                raise ValueError(f"{value!r}: #expert= needs the number of an expert, from 0, such as MODEL#expert=3")
            path, _, revision = whole.partition("@")
            if not path:
                raise ValueError(f"{value!r} is not a model reference; write MODEL or MODEL@REVISION")
            return {"path": path, "revision": revision or None, "expert": int(expert) if marked else None}
        return value

    def __str__(self) -> str:
        plain = f"{self.path}@{self.revision}" if self.revision else self.path
        return plain if self.expert is None else f"{plain}{EXPERT}{self.expert}"

    @property
    def name(self) -> str:
        """The last part of the path, without a GGUF ending; of an expert with its number."""
        name = Path(self.path.rstrip("/")).name.removesuffix(".gguf")
        return name if self.expert is None else f"{name}-expert{self.expert}"


class ModelReference(BaseModel):
    """A model, with or without a LoRA adapter on it; reads and writes mergekit's short form."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelPath
    lora: ModelPath | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            model, plus, lora = value.partition("+")
            if not model or (plus and not lora) or "+" in lora:
                raise ValueError(f"{value!r} is not a model reference; write MODEL or MODEL+ADAPTER")
            if EXPERT in lora:
                raise ValueError(f"{value!r}: write MODEL{EXPERT}{lora.partition(EXPERT)[2]}+ADAPTER, the expert first")
            return {"model": model, "lora": lora or None}
        if not isinstance(value, dict | ModelReference):
            raise ValueError(f"{value!r} is not a model reference; write MODEL or MODEL+ADAPTER")
        return value

    @property
    def is_mergekits(self) -> bool:
        """Whether mergekit knows the reference: it has no experts of mixtures, GGUF files and package files."""
        return not any(
            path.expert is not None or path.path.endswith(".gguf") or path.path.startswith(PACKAGE)
            for path in (self.model, self.lora)
            if path
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Write a reference as its text. A serializer in Python would do so as well, but pydantic replaces whatever is
        raised in one, KeyboardInterrupt too, by a ValueError.
        """
        return cast(CoreSchema, {**handler(source), "serialization": to_string_ser_schema(when_used="always")})

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the short form. Raises pydantic's ValidationError (a ValueError)."""
        return cls.model_validate(text)

    @cached_property
    def _text(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)

    def __str__(self) -> str:
        return self._text

    # A merge compares and looks up references for every tensor; field by field that costs a tenth of its time.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ModelReference) and self._text == other._text)

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def name(self) -> str:
        """The adapter's name, or the model's."""
        return (self.lora or self.model).name


def path_from(path: str, root: Path, folder: Path) -> str:
    """Return a path that starts at `root` as a file in `folder` names it.

    Only relative paths that exist change: hub ids, absolute paths and files of packages are the same from everywhere.
    """
    local = Path(path).expanduser()
    if path.startswith(PACKAGE) or local.is_absolute() or not (root / local).exists():
        return path
    # From the real folder: `..` behind a link is another place.
    return os.path.relpath(root.resolve() / local, folder.resolve())


def reference_from(reference: ModelReference, root: Path, folder: Path) -> ModelReference:
    """Return a reference whose relative paths start at `root` as a file in `folder` names it."""

    def of(part: ModelPath) -> ModelPath:
        return part.model_copy(update={"path": path_from(part.path, root, folder)})

    return ModelReference(model=of(reference.model), lora=of(reference.lora) if reference.lora else None)


def folder_of(path: ModelPath, root: Path = Path()) -> Path:
    """Return the folder in Hugging Face format that a path stands for, downloaded or converted if need be.

    Relative paths start at `root`. Raises SourceError where there is none.
    """
    local = place_of(path, root)
    if local.suffix == ".gguf" and local.is_file():
        return _converted(local)
    if not local.is_dir():
        raise SourceError(f"{path}: {local} is a file; give the folder of a model, or a .gguf file")
    return local


def place_of(path: ModelPath, root: Path = Path()) -> Path:
    """Return the file or folder that a path stands for, as it is: a GGUF file is not converted.

    Downloads it if need be. Raises SourceError where there is none.
    """
    return _local(path, root) or _download(path, root)


def on_this_machine(reference: ModelReference, root: Path = Path()) -> ModelReference:
    """Return the reference as it is found from every folder: what lies on this machine by its absolute path."""

    def absolute(path: ModelPath) -> ModelPath:
        local = root / Path(path.path).expanduser()
        is_here = not path.path.startswith(PACKAGE) and local.exists()
        return path.model_copy(update={"path": str(local.resolve())}) if is_here else path

    lora = absolute(reference.lora) if reference.lora else None
    return ModelReference(model=absolute(reference.model), lora=lora)


def load_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Return `kind.from_pretrained(folder)`, for transformers' automatic classes; for tokenizers see `load_tokenizer`.

    Raises SourceError for files that cannot be read, whatever their reader raises.
    """
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{folder}: transformers cannot load {LOADED.get(kind.__name__, 'it')} ({type(error).__name__}: {reason});"
            " if its files are damaged, download them again"
        ) from error


def _local(path: ModelPath, root: Path) -> Path | None:
    """Return the file or folder on this machine, or None for a hub id."""
    if path.path.startswith(PACKAGE):
        package, _, name = path.path.removeprefix(PACKAGE).partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # a dotted name in a package that is not installed, or no name
            spec = None
        places = (spec.submodule_search_locations if spec else None) or []
        found = [place for place in (Path(place) / name for place in places) if place.exists()]
        if not found:
            raise SourceError(f"{path}: no Python package {package!r} with a file {name!r} is installed here")
        return found[0]
    local = root / Path(path.path).expanduser()
    if local.exists():
        return local
    if path.path.startswith((".", "/", "~")) or path.path.count("/") != (2 if path.path.endswith(".gguf") else 1):
        raise SourceError(f"{path}: there is no such folder ({local}), and it does not look like a hub id (owner/name)")
    return None


def _download(path: ModelPath, root: Path) -> Path:
    """Download from the hub, or find in its cache. Raises SourceError, for a path in a folder of `root` that it does
    not exist: there may be a folder here with the name of the hub id's owner.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if path.path.endswith(".gguf"):
            repo, _, name = path.path.rpartition("/")
            return Path(hf_hub_download(repo, name, revision=path.revision))
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
        folder = Path(snapshot_download(path.path, revision=path.revision, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            pickled = [*wanted, "pytorch_model*.bin", "adapter_model.bin"]
            folder = Path(snapshot_download(path.path, revision=path.revision, allow_patterns=pickled))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first, *_ = Path(path.path).parts
        if (root / first).is_dir():
            raise SourceError(
                f"{path}: {(root / path.path).absolute()} does not exist, and the Hugging Face hub gives no such model"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{path}: neither a local folder nor available from the Hugging Face hub ({reason})"
        ) from error


def _converted(file: Path) -> Path:
    """Return the bf16 Hugging Face folder of a GGUF file, in the cache; converts it the first time.

    Raises SourceError, also for a file that is one part of several, or lacks a weight of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    out = cache_folder() / "gguf" / f"{file.stem}-{content_checksums([file])[file][:16]}"
    if out.exists():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"{out.parent} cannot be written ({error.strerror or error}); set LLMEVO_HOME to another folder"
        ) from error
    try:
        with partial_folder(out) as partial:
            _check_whole(file)
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            dequantized = GgufConfig(dequantize=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=dequantized,
                output_loading_info=True,
            )
            model, loading = loaded
            if missing := sorted(loading["missing_keys"]):  # transformers gives these random numbers
                raise SourceError(
                    f"{file}: it lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} of the"
                    " model; download it again"
                )
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            rename_once(partial, out)
    except SourceError:
        raise
    except ImportError as error:
        raise SourceError(f"{file}: GGUF files need `pip install '.[gguf]'` in llmevo's clone ({error})") from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # transformers and its GGUF reader raise many kinds; Rust code, panics
        hint = "; GGUF files need `pip install '.[gguf]'` in llmevo's clone" if "accelerate" in str(error) else ""
        raise SourceError(f"{file}: could not be converted to a Hugging Face folder ({error}){hint}") from error
    return out


def _check_whole(file: Path) -> None:
    """Raise SourceError for a GGUF file that is one part of a split file. Raises ImportError without `gguf`."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("split.count")
    if field and (count := int(field.contents())) > 1:
        raise SourceError(
            f"{file}: it is one of {count} parts of a model; join them (`llama-gguf-split --merge FIRST_PART OUT.gguf`)"
            " and name the whole file"
        )


def short_names(references: Sequence[ModelReference]) -> dict[ModelReference, str]:
    """Return the last path part of each model, with the parent folder's where two would be equal."""
    names = [reference.name for reference in references]
    unique: dict[ModelReference, str] = {}
    for reference, name in zip(references, names, strict=True):
        parent = Path((reference.lora or reference.model).path).parent.name
        longer = f"{parent}-{name}" if names.count(name) > 1 and parent else name
        unique[reference] = longer if longer not in unique.values() else f"{longer}-{len(unique)}"
    return unique
