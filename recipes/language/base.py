"""A pretrained language model on disk: what it is, whether it is whole, and loading it by transformers.

`find` reads no weights. A GGUF file is turned into safetensors once (transformers takes a minute for 135 M parameters)
and kept in the cache folder: `$TRAINER_CACHE`, else `~/.cache/trainer`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from recipes.language.cache import cache_folder
from recipes.language.places import PREFIX, resolve
from trainer.errors import UserError
from trainer.files import locked, reason, remove

KEY = "init_from"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
_GGUF_MAGIC = b"GGUF"
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10
_CONVERSION = 1
"""Version of what the cache holds of a GGUF file."""


@dataclass(frozen=True)
class Base:
    """Weights to begin with. Two of the same `fingerprint` are the same, wherever they lie."""

    name: str
    """`init_from` as the config has it."""
    kind: Literal["folder", "gguf", "hub"]
    path: Path
    """The folder or the GGUF file; of a hub id the folder in the hub's cache."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the configuration and the weights, hex, 64 digits.

        Of each file of weights it takes the size, the table of contents (a safetensors header) and 16 samples of
        64 KiB spread evenly over it: milliseconds for 70 B parameters, and two trainings of one model differ in it.
        """
        digest = hashlib.sha256()
        if self.kind == "gguf":
            _digest_file(self.path, digest)
        else:
            digest.update(_bytes(self.path / "config.json"))
            for file in sorted(self.path.glob("*.safetensors")):
                digest.update(file.name.encode())
                _digest_file(file, digest)
        return digest.hexdigest()

    @cached_property
    def folder(self) -> Path:
        """What transformers loads: safetensors, config and tokenizer. A GGUF file is converted, where it was not yet.

        Safe when several processes ask at once: one converts, the others wait.
        """
        return _converted(self.path, self.fingerprint) if self.kind == "gguf" else self.path

    @property
    def source(self) -> str:
        """Where another program finds it: the hub id, or the folder's whole path."""
        return self.name if self.kind == "hub" else str(self.folder.resolve())

    @cached_property
    def license(self) -> str | None:
        """As the model says it: `license:` at the head of its README.md, or a GGUF's `general.license`."""
        readme = self.folder / "README.md"
        text = readme.read_text(errors="replace") if readme.is_file() else ""
        found = re.search(r"(?m)^license:\s*(\S+)\s*$", text)
        return found[1] if found else None

    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model."""
        from transformers import AutoTokenizer

        with _plain(self, "its tokenizer can't be read"):
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def config(self) -> Any:
        """transformers' configuration of the model."""
        from transformers import AutoConfig

        with _plain(self, "its config.json can't be read"):
            return AutoConfig.from_pretrained(self.folder, local_files_only=True)

    def load(self, dtype: Any, attention: str | None, quantization: Any = None) -> nn.Module:
        """The model with its weights, on the CPU; with `quantization` on the current accelerator, where there is one.

        Args:
            dtype: of the weights; of those that are not quantised, with `quantization`.
            attention: one of transformers' implementations, e.g. `sdpa`; None lets it choose.
            quantization: transformers' `BitsAndBytesConfig`.
        """
        import torch
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {}
        if quantization is not None:
            place = torch.accelerator.current_device_index() if torch.cuda.is_available() else "cpu"
            options = {"quantization_config": quantization, "device_map": {"": place}}
        with _plain(self, "can't be loaded"), quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, attn_implementation=attention, local_files_only=True, **options
            )
        model.name_or_path = model.config.name_or_path = self.source  # PEFT writes it down with an adapter
        return cast(nn.Module, model)


def find(init_from: str) -> Base:
    """What `init_from` names, looked at but not loaded: a folder, a GGUF file, or a hub id (brought here if need be).

    Raises UserError for what is not there or can't be a model.
    """
    path = Path(init_from).expanduser()
    if init_from.startswith(PREFIX) or path.exists():
        path = resolve(init_from, KEY)
        if path.is_dir():
            _check_folder(init_from, path)
            return Base(init_from, "folder", path)
        with path.open("rb") as file:
            if file.read(4) != _GGUF_MAGIC:
                raise UserError(f"{KEY}: {init_from} is no GGUF file; give one, or a folder with safetensors")
        base = Base(init_from, "gguf", path)
        if not _conversion(base.path, base.fingerprint).is_dir():  # one that was converted is whole; a look takes 1.5 s
            _check_gguf(init_from, path)
        return base
    if not _HUB_ID.fullmatch(init_from) or path.suffix == ".gguf":
        raise UserError(f"{KEY}: {init_from!r} is not there; looked in {Path.cwd()}")
    folder = _from_hub(init_from)
    _check_folder(init_from, folder)
    return Base(init_from, "hub", folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, which would stand between our lines."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _plain(base: Base, what: str) -> Iterator[None]:
    """transformers' errors as one line; of its many lines the first says it."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{KEY}: {base.name}: {what} ({type(error).__name__}: {first})") from error


def _check_folder(name: str, folder: Path) -> None:
    try:
        config = json.loads(_bytes(folder / "config.json"))
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{KEY}: {name}: no model: config.json can't be read ({why})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{KEY}: {name}: no model: its config.json has no model_type")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{KEY}: {name} holds an adapter: merge it into its base first (`trainer merge`)")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [file.name for file in sorted(folder.glob("*.bin"))]
        hint = f"; {others[0]} would have to be unpickled: convert it to safetensors" if others else ""
        raise UserError(f"{KEY}: {name}: there are no weights (*.safetensors) in it{hint}")
    for file in files:
        try:
            header = _safetensors_header(file)
            ends = [item["data_offsets"][1] for key, item in json.loads(header).items() if key != "__metadata__"]
            size = 8 + len(header) + max(ends, default=0)
            if file.stat().st_size != size:
                raise ValueError(f"{file.stat().st_size} bytes, {size} wanted")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{KEY}: {name}: {file.name} is damaged ({error}); fetch it again") from error


def _check_gguf(name: str, path: Path) -> None:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise UserError(f"{KEY}: {name}: GGUF files need the library gguf: pip install gguf") from error
    try:
        reader = GGUFReader(path)  # maps the file and follows its tables: one that was cut short ends here
        if not reader.tensors or reader.get_field("general.architecture") is None:
            raise ValueError("no tensors, or no architecture")
    except Exception as error:  # whatever a reader meets in a broken file
        raise UserError(
            f"{KEY}: {name}: the GGUF file is broken ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        raise UserError(f"{KEY}: {name!r} is no folder or file here, and the hub has no such model") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise UserError(
            f"{KEY}: {name!r} is no folder or file here, is not in the hub's cache, and {why}; give a path, or fetch "
            f"it where there is a network: hf download {name}"
        ) from error


def _converted(path: Path, fingerprint: str) -> Path:
    """The folder in the cache with the GGUF file's weights in fp32, made where it is not there."""
    folder = _conversion(path, fingerprint)
    place = folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / f".{folder.name}.lock"):
            if not folder.is_dir():
                for left in place.glob(f".{folder.name}.making-*"):  # of a process that was killed: we hold the lock
                    remove(left)
                making = place / f".{folder.name}.making-{secrets.token_hex(4)}"
                try:
                    _convert(path, making)
                    os.replace(making, folder)
                finally:
                    remove(making)
    except OSError as error:
        raise UserError(
            f"{KEY}: {path.name} can't be converted into {place} ({reason(error)}); set TRAINER_CACHE to a folder with "
            "room for its weights in fp32"
        ) from error
    return folder


def _conversion(path: Path, fingerprint: str) -> Path:
    return cache_folder() / "gguf" / f"{path.stem[:60]}-{fingerprint[:16]}-v{_CONVERSION}"


def _convert(path: Path, target: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{path.name}: turned into safetensors, once, for later starts ...", file=sys.stderr, flush=True)
    where = {"gguf_file": path.name, "local_files_only": True}
    with quiet(), redirect_stderr(StringIO()):  # a progress bar that takes no orders
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        except (ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
            first = str(error).partition("\n")[0]
            raise UserError(f"{KEY}: {path.name}: transformers can't read this GGUF file: {first}") from error
        # The weights are whole numbers of bits no longer: without this they'd be loaded as quantised.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    said = GGUFReader(path).get_field("general.license")
    if said is not None:
        (target / "README.md").write_text(f"---\nlicense: {said.contents()}\n---\n")


def _digest_file(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    if file.suffix == ".safetensors":
        digest.update(_safetensors_header(file))
    with file.open("rb") as opened:
        for index in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))


def _safetensors_header(file: Path) -> bytes:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(100 << 20, file.stat().st_size - 8):
            raise ValueError("no table of contents")
        return opened.read(length)


def _bytes(file: Path) -> bytes:
    return file.read_bytes()
