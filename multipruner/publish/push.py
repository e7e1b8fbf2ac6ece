"""Push a finished run to the Hugging Face Hub: only what belongs to it, only what changed there, private by default."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import SILENCE, PublishError, hub_errors, patience
from .package import Package, check_name, human, prepare
from .upload import Pushed, check_contents, check_tag, check_token, check_visibility, contents, look, push_to_hub

if TYPE_CHECKING:
    from rich.console import Console


def read_token(file: str | Path | None = None) -> str:
    """Return the Hub token: from a file, else from ``HF_TOKEN`` or what ``hf auth login`` stored. It is never shown.

    Raises:
        PublishError: when there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    if file is None:
        token = get_token()
        if not token:
            raise PublishError("no Hub token: give --token-file FILE, set HF_TOKEN, or log in with `hf auth login`")
    else:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise PublishError(f"the token file {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            token = ""
    if not re.fullmatch(r"[!-~]{1,500}", token):  # anything else would end up in the transport's error message
        raise PublishError(f"{file or 'HF_TOKEN'} does not hold a token: one line without spaces is expected")
    return token


def check_push(
    repo: str,
    *,
    public: bool = False,
    yes: bool = False,
    token_file: str | Path | None = None,
    endpoint: str | None = None,
    console: Console | None = None,
) -> None:
    """Check before a long run whatever would stop a push at its end. Asks about ``public``, so that the push need not.

    Raises:
        PublishError: as :func:`push` would.
    """
    from huggingface_hub import HfApi

    check_name(repo)
    token = read_token(token_file)
    api = HfApi(endpoint=endpoint, token=token)
    with hub_errors(repo, api.endpoint, token), patience(SILENCE):
        check_token(api, repo)
        there = look(api, repo, SILENCE)
        check_visibility(there, repo, public)
        if there is not None:
            check_contents(repo, contents(api, repo)[0])
    if public and not yes and not _ask(repo, console):
        raise PublishError("nothing was done")


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    yes: bool = False,
    token_file: str | Path | None = None,
    dry_run: bool = False,
    tag: str | None = None,
    message: str | None = None,
    skip_foreign: bool = False,
    license: str | None = None,
    endpoint: str | None = None,
    console: Console | None = None,
) -> Pushed | None:
    """Return what ``python -m multipruner push`` does: :func:`push_to_hub` with a token, a question and a few words.

    Args:
        yes: make it public without asking.
        token_file: holds the token; default ``HF_TOKEN`` or the stored login.
        dry_run: list what would go; needs neither token nor network, and returns ``None``.
        skip_foreign: leave out what is not part of the run instead of stopping.
        license: the licence, instead of what the dense model's card says.
        console: default: standard output.

    Raises:
        MultiprunerError: one line that names the mend.
    """
    from rich.console import Console

    from multipruner.console.progress import waiting_display

    console = console or Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    package = prepare(folder, repo, skip_foreign=skip_foreign, license=license)
    for name in package.run.foreign:
        say(f"left out, not part of the run: {name}")
    if dry_run:
        _list(package, public, tag, say)
        return None
    token = read_token(token_file)
    with _progress_bars(console), ExitStack() as stack:

        def begin(agreed: bool = True) -> bool:
            if agreed and not console.is_terminal:  # where the Hub library's own bars are not
                stack.enter_context(waiting_display(console, "push"))
            return agreed

        confirm = None if yes or not public else lambda: begin(_ask(repo, console))
        if confirm is None:
            begin()
        done = push_to_hub(
            package, token=token, public=public, tag=tag, message=message, endpoint=endpoint, confirm=confirm, say=say
        )
    removed = f", {len(done.removed)} stale removed" if done.removed else ""
    say(f"{len(done.sent)} files sent, {len(done.unchanged)} unchanged{removed}; tag {done.tag}")
    say(f"{'public' if done.public else 'private'}: {done.url}")
    return done


def _list(package: Package, public: bool, tag: str | None, say: Callable[[str], None]) -> None:
    check_tag(tag)
    items = package.items(package.about_base(None))
    say(f"to {package.repo} ({'public' if public else 'private'}), tag {tag or 'the next free of v1, v2 ...'}:")
    for item in items:
        note = f"  (written for {package.repo})" if isinstance(item.source, bytes) else ""
        say(f"{human(item.size):>10}  {item.name}{note}")
    say(f"{human(sum(item.size for item in items)):>10}  in {len(items)} files; a dry run: nothing was sent")


def _ask(repo: str, console: Console | None) -> bool:
    if not sys.stdin.isatty():
        raise PublishError("--public asks first, and there is no terminal to ask on; add --yes to go without asking")
    print(f"{repo} will be public: everybody can see and download it. Go on? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def _progress_bars(console: Console) -> Iterator[None]:
    """Show the Hub library's bars on a terminal, and nowhere else."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    (enable_progress_bars if console.is_terminal else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()
