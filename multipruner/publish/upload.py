"""Send a package to the Hub: only what changed there, in one commit, public only at the very end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from multipruner.checkpoint.run_folder import left_over
from multipruner.core import __version__

from .errors import SILENCE, PublishError, hub_errors, patience
from .package import Item, Package, human

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo, url, commit, tag: where it is now.
        sent, unchanged, removed: names of files; ``unchanged`` were there already, byte for byte.
        public: whether everybody can see it.
    """

    repo: str
    url: str
    commit: str
    tag: str
    sent: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    public: bool


def push_to_hub(
    package: Package,
    *,
    token: str,
    public: bool = False,
    tag: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
    confirm: Callable[[], bool] | None = None,
    say: Callable[[str], None] = lambda text: None,
    silence: float = SILENCE,
) -> Pushed:
    """Create the repository if need be, send what differs from it in one commit, tag it, and only then make it public.

    What was sent before an interruption is not sent again.

    Args:
        package: from :func:`prepare`.
        token: one that may write.
        public: whether everybody may see it; a repository that is public already is otherwise refused.
        tag: default: the next free of v1, v2 ...
        message: of the commit.
        endpoint: the Hub's address; default ``HF_ENDPOINT``.
        confirm: asked before anything is sent to where everybody can see it; ``False`` stops.
        say: where messages go.
        silence: seconds without a sign of life after which a call is given up (sending a file is tried six times).

    Raises:
        PublishError: when the Hub says no, breaks off, falls silent or cannot be reached; the line names the mend.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="multipruner", library_version=__version__)
    repo = package.repo
    check_tag(tag)
    with hub_errors(repo, api.endpoint, token), patience(silence):
        check_token(api, repo)
        there = look(api, repo, silence)
        check_visibility(there, repo, public)
        if public and confirm and not confirm():
            raise PublishError("nothing was sent")
        about = package.about_base(api)
        items = package.items(about)
        if any(token.encode() in (item.text or b"") for item in items):
            raise PublishError("one of the files holds the token itself; take it out, nothing was sent")
        if not (package.license or about.get("license")):
            say(f"the licence of {package.run.plan.model} is not known; name it with --license ID")
        if there is None:
            api.create_repo(repo, private=True, exist_ok=True)
            there = look(api, repo, silence)
            if there is None:
                raise PublishError(f"{repo} was created and is not there; push again")
        files, tags = contents(api, repo)
        changed = [item for item in items if not item.same_as(files.get(item.name))]
        gone = left_over(set(files), {item.name for item in items})
        check_contents(repo, files)
        commit = there.sha
        wanted = _tag(repo, tag, tags, None if changed or gone else commit)
        if changed or gone:
            size = human(sum(item.size for item in changed))
            say(f"sending {len(changed)} of {len(items)} files ({size}) to {repo}")
            text = message or f"{package.run.report.get('ratio', 0):.1%} pruned, by multipruner {__version__}"
            commit = _commit(api, repo, changed, gone, text, commit, say).oid
        if wanted not in tags:
            api.create_tag(repo, tag=wanted, revision=commit, exist_ok=True)
        if public and there.private:
            api.update_repo_settings(repo, private=False)
    sent, unchanged = tuple(item.name for item in changed), tuple(i.name for i in items if i not in changed)
    return Pushed(repo, f"{api.endpoint}/{repo}", commit, wanted, sent, unchanged, tuple(gone), public)


def _tag(repo: str, tag: str | None, tags: Mapping[str, str], commit: str | None) -> str:
    """Return the tag of a push: as asked, else what the unchanged ``commit`` is called, else the next number."""
    if tag:
        if tag in tags and tags[tag] != commit:
            raise PublishError(f"{repo} has a tag {tag!r} already; choose another --tag, nothing was sent")
        return tag
    here = [name for name, target in tags.items() if target == commit]
    numbers = (int(name[1:]) for name in tags if re.fullmatch(r"v\d+", name))
    return here[-1] if here else f"v{max(numbers, default=0) + 1}"


def check_tag(tag: str | None) -> None:
    """Raise PublishError for what cannot be a tag."""
    if tag is not None and (not re.fullmatch(r"[A-Za-z0-9][\w.-]*", tag) or tag == "main"):
        raise PublishError(f"{tag!r} cannot be a tag; use letters, digits, '.', '-' and '_', and not 'main'")


def check_token(api: HfApi, repo: str) -> None:
    """Raise PublishError for a token that only reads, and the Hub's own error for an unknown one."""
    user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishError(
            f"the token of {user.get('name')!r} may only read (403 for {repo}); make one that may write at "
            f"{api.endpoint}/settings/tokens"
        )


def look(api: HfApi, repo: str, silence: float) -> Any:
    """Return the Hub's ``ModelInfo`` of a repository, ``None`` when there is none to be seen."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo, timeout=silence)  # this call knows no default
    except RepositoryNotFoundError:
        return None


def contents(api: HfApi, repo: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return files of the repository by name, and its tags with their commits."""
    files = {file.path: file for file in api.list_repo_tree(repo, recursive=True) if hasattr(file, "blob_id")}
    return files, {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}


def check_visibility(there: Any, repo: str, public: bool) -> None:
    """Raise PublishError when a push that is meant to be private would be seen by everybody."""
    if there is not None and not there.private and not public:
        raise PublishError(f"{repo} is public: everybody would see it; say --public, or choose another name")


def check_contents(repo: str, files: Mapping[str, Any]) -> None:
    """Raise PublishError when the repository holds what no run wrote."""
    others = set(files) - {".gitattributes", "README.md", "LICENSE"}
    if others and "plan.json" not in files:
        raise PublishError(f"{repo} holds something else ({', '.join(sorted(others)[:3])}); choose another name")


def _commit(
    api: HfApi,
    repo: str,
    items: Sequence[Item],
    gone: Sequence[str],
    message: str,
    parent: str | None,
    say: Callable[[str], None],
) -> Any:
    """Return one commit with everything; a Hub without Xet storage gets the files through LFS."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    deletions = [CommitOperationDelete(name) for name in gone]
    try:
        additions = [CommitOperationAdd(item.name, item.source) for item in items]
        return api.create_commit(repo, [*additions, *deletions], commit_message=message, parent_commit=parent)
    except (ConnectionError, RuntimeError) as error:  # what hf_xet raises; the Hub's own errors are of other classes
        if "xet" not in str(error).lower() or type(error).__name__ == "OfflineModeIsEnabled":
            raise
    say("no Xet storage there: sending large files through LFS")
    with ExitStack() as stack:  # huggingface_hub sends what it is given as open files through LFS

        def opened(source: Path | bytes) -> BinaryIO | bytes:
            return source if isinstance(source, bytes) else stack.enter_context(source.open("rb"))

        additions = [CommitOperationAdd(item.name, opened(item.source)) for item in items]
        return api.create_commit(repo, [*additions, *deletions], commit_message=message, parent_commit=parent)
