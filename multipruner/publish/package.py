"""What of a finished run goes to the Hub, and under which name: files, the card, the tag."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from multipruner.checkpoint.run_folder import RunFolder, read_run
from multipruner.core.errors import OutputError
from multipruner.report.card import addressed, base_model, is_untouched, model_card
from multipruner.report.markup import front_matter

from .errors import PublishError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_TEXTS = (".json", ".jsonl", ".md", ".py", ".jinja", ".txt", ".html", ".csv")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Item:
    """One file to push: its name in the repository, and where its bytes are."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def chunks(self) -> Iterator[bytes]:
        if isinstance(self.source, bytes):
            yield self.source
            return
        with self.source.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    @property
    def text(self) -> bytes | None:
        """The content of a text file, ``None`` for any other."""
        return b"".join(self.chunks()) if self.name.endswith(_TEXTS) else None

    def same_as(self, remote: Any) -> bool:
        """Tell whether a file of the repository (huggingface_hub's ``RepoFile``) has these bytes, by size and hash."""
        if remote is None or remote.size != self.size:
            return False
        # an LFS file is known by its SHA-256, any other by what git calls it
        digest = hashlib.sha256() if remote.lfs else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest() == (remote.lfs.sha256 if remote.lfs else remote.blob_id)


@dataclass(frozen=True)
class Package:
    """A run, ready to be pushed under a name.

    Attributes:
        license: the licence for the card; default: what the dense model's card says.
    """

    run: RunFolder
    repo: str
    license: str | None = None

    def items(self, about_base: Mapping[str, Any]) -> list[Item]:
        """Return the files, with the card written anew for the repository.

        Raises:
            PublishError: when one of them holds what looks like a token.
        """
        files = [Item(name, self.run.path / name) for name in self.run.files if name != "README.md"]
        items = [Item("README.md", self._card(about_base).encode()), *files]
        for item in items:
            if _SECRET.search(item.text or b""):
                raise PublishError(f"{item.name} holds what looks like a Hub token; take it out, nothing was sent")
        return items

    def _card(self, about_base: Mapping[str, Any]) -> str:
        licence: Any = self.license or {key: text for key, text in about_base.items() if key.startswith("license")}
        languages = about_base.get("language") or ()
        pictures = (name for name in self.run.files if name.endswith("structure.png"))
        try:
            card = self._written(licence, languages, next(pictures, None))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{self.run.path}/report.json is damaged ({error!r}); make the run again") from error
        local = self.run.path / "README.md"
        text = local.read_text(encoding="utf-8") if local.exists() else ""
        return addressed(text, card, self.repo) if text and not is_untouched(text) else card

    def _written(self, licence: Any, languages: Any, figure: str | None) -> str:
        return model_card(
            self.run.report,
            self.run.plan,
            license=licence or None,
            languages=(languages,) if isinstance(languages, str) else tuple(languages),
            name=self.repo,
            figure=figure,
            stock="auto_map" not in self.run.config,
        )

    def _dense_folder(self) -> Path:
        """Tell where the dense model's folder is, if it is one: as seen from the run, else as the plan names it."""
        about = self.run.report.get("model")
        seen = about.get("path_from_here") if isinstance(about, Mapping) else None
        return self.run.path.resolve() / seen if isinstance(seen, str) else Path(self.run.plan.model)

    def about_base(self, api: HfApi | None) -> dict[str, Any]:
        """Return the metadata of the dense model's own card: from its folder, else from the Hub; empty if unknown."""
        local, base = self._dense_folder() / "README.md", base_model(self.run.report, self.run.plan)
        if local.is_file():
            metadata = front_matter(local.read_text(encoding="utf-8", errors="replace"))[0]
            try:
                found = yaml.safe_load(metadata or "")
            except yaml.YAMLError:
                found = None
            return found if isinstance(found, dict) else {}
        if api is None or base is None:
            return {}
        try:
            data = api.model_info(base, timeout=10).card_data
        except Exception:  # the licence is good to have; whatever is wrong with the Hub shows in the next call
            return {}
        about = data.to_dict() if data else {}
        if about.get("license_link") and "://" not in about["license_link"]:
            about["license_link"] = f"{api.endpoint}/{base}/blob/main/{about['license_link']}"
        return about


def prepare(folder: str | Path, repo: str, *, skip_foreign: bool = False, license: str | None = None) -> Package:
    """Look at a folder and a name; nothing is sent.

    Raises:
        OutputError: when the folder is no finished run.
        PublishError: when the name cannot be one, or the folder holds what is not part of the run.
    """
    check_name(repo)
    run = read_run(folder)
    check_weights(run)
    if run.foreign and not skip_foreign:
        shown = ", ".join(run.foreign[:5]) + (f" and {len(run.foreign) - 5} more" if len(run.foreign) > 5 else "")
        raise PublishError(f"{folder} holds what is not part of the run: {shown}; move it, or add --skip-foreign")
    return Package(run, repo, license)


def check_weights(run: RunFolder) -> None:
    """Refuse to share weights that are not all there, or not finite.

    Raises:
        OutputError: naming the file.
    """
    from safetensors import safe_open

    count = 0
    for name in (name for name in run.files if name.endswith(".safetensors")):
        with safe_open(run.path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(key)
                count += tensor.numel()
                if not tensor.isfinite().all():
                    raise OutputError(f"{run.path}/{name} is damaged: {key} holds NaN or infinity; make the run again")
    told = run.report.get("parameters")
    after = told.get("after") if isinstance(told, Mapping) else None
    if isinstance(after, int) and count < after:
        raise OutputError(f"{run.path} holds {count:,} of the model's {after:,} parameters; make the run again")


def check_name(repo: str) -> None:
    """Raise PublishError for what cannot be ``user/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise PublishError(f"{repo!r} cannot be the name of a repository ({error}); give user/name") from None


def human(size: int) -> str:
    """Return bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{size:.1f} GB"
