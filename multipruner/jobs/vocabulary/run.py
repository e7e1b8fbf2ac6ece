"""A dense checkpoint written with fewer tokens, tensor by tensor."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from multipruner.checkpoint.run_folder import VOCABULARY
from multipruner.checkpoint.save import CARD, SHARD_SIZE, check_space, check_target, keep_others, weight_bytes
from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.console.events import tell
from multipruner.console.progress import bytes_display, counting_display, named, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import CalibrationError, ConfigError, OutputError
from multipruner.engine.precision import Precision
from multipruner.eval.text import wikitext_text
from multipruner.sources.dense import Accounted, accounted, load_dense
from multipruner.sources.resolve import ResolvedModel, resolve
from multipruner.storage.files import open_to_others, whole_folder
from multipruner.storage.tensor_headers import json_object
from multipruner.stream.dense import deferred_model
from multipruner.stream.write import write_weights
from multipruner.stream.written import check_written
from multipruner.vocabulary.choice import Choice, choose
from multipruner.vocabulary.ids import named_ids, renumbered
from multipruner.vocabulary.kinds import Kind, kind_of
from multipruner.vocabulary.tokenizer import cut_record, serialised, special_ids, tokenizer_of, write_files
from multipruner.vocabulary.weights import check_places, keep_rows, row_parameters

from .loss import bits_per_byte, pieces_of
from .record import Result, Sizes, card_of, record_of
from .text import Text, count_tokens, encoded, fit, read_text, template_ids

_LADDER = (196_608, 131_072, 98_304, 65_536, 49_152, 32_768, 24_576, 16_384, 12_288, 8_192, 4_096)
_TRIED = 2000
"""Rows of held-out text that tokenizers are compared on."""
_PIECES = 64
"""Pieces of a text that losses are compared on."""
_RESERVED = ("unused", "reserved")
_SETTINGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Wanted:
    """What is asked.

    Attributes:
        text: sources of the text that tokens are counted in.
        tokens: how many stay; ``None``: all that the text has.
        multiple: their number is raised to a multiple of this.
        text_tokens: the most that is read of a stream.
        drop_reserved: whether added tokens go that are reserved or unused by their names.
        dry_run: whether sizes are only shown.
        measure: whether bits per byte are compared.
    """

    text: Sequence[str]
    tokens: int | None = None
    multiple: int = 64
    text_tokens: int = 20_000_000
    drop_reserved: bool = False
    dry_run: bool = False
    measure: bool = True


@dataclass(frozen=True)
class _Dense:
    """The dense model as far as its vocabulary goes."""

    found: Accounted
    model: PreTrainedModel
    record: Mapping[str, Any]
    kind: Kind
    text: Text
    counts: Counter[int]
    needed: frozenset[int]

    def chosen(self, tokens: int | None, multiple: int) -> Choice:
        return choose(self.kind, self.counts, self.needed, tokens, multiple)

    def cut(self, choice: Choice) -> dict[str, Any]:
        return cut_record(self.record, self.kind, choice.numbers)

    def sizes(self, choice: Choice, record: Mapping[str, Any]) -> Sizes:
        rows, each = row_parameters(self.model)
        fitted = fit(self.found.tokenizer, tokenizer_of(record), self.text.held_out[:_TRIED], choice.numbers)
        parameters = sum(tensor.numel() for tensor in self.model.parameters())
        return Sizes(rows, len(choice.ids), parameters, parameters - each * (rows - len(choice.ids)), fitted)


def cut_vocabulary(
    recipe: Recipe,
    wanted: Wanted,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Write a dense model with fewer tokens, and return what its record says; nothing where it is a dry run.

    Args:
        recipe: its ``model``, ``revision``, ``fallback``, ``trust_remote_code``, ``device``, ``compute_dtype`` and
            ``evaluation.text`` count.
        wanted: what is asked.
        output: the folder; it appears only when everything is there.
        console: where progress goes; default: nowhere.
        command: the command line, for the record.
        overwrite: whether an earlier result in ``output`` may be replaced.

    Raises:
        ConfigError: when a number cannot be meant, or too few tokens are asked for.
        CalibrationError: when a text cannot be read.
        UnsupportedModelError: for a tokenizer or a model of another kind.
        OutputError: when the folder cannot be written, or does not hold what it should; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    say, began = teller(console), time.perf_counter()
    if wanted.multiple < 1 or wanted.text_tokens < 1 or (wanted.tokens is not None and wanted.tokens < 1):
        raise ConfigError("--tokens, --multiple and --text-tokens are at least 1")
    target = output.absolute().resolve()
    if not wanted.dry_run:
        check_target(target, overwrite)
    source = resolve(recipe, say)
    dense = _dense(source, recipe, wanted, console)
    if wanted.dry_run:
        _show_ladder(dense, wanted, console)
        return None
    choice = dense.chosen(wanted.tokens, wanted.multiple)
    cut = dense.cut(choice)
    sizes = dense.sizes(choice, cut)
    say(sizes.line())
    if sizes.after >= sizes.before:
        raise ConfigError(f"all {sizes.before:,} tokens would stay; give --tokens N below that, or a narrower text")
    measured = _measured(source, recipe, dense, choice, cut, console) if wanted.measure else {}
    result = Result(source, recipe, sizes, choice, asdict(wanted), measured, command)
    for line in result.lines():
        say(line)
    check_space(target, weight_bytes(dense.model))
    smaller = keep_rows(dense.model, choice.ids)
    with whole_folder(target, keep_others) as partial_folder:
        lost = _write(partial_folder, dense, smaller, choice, cut, recipe, console)
        (partial_folder / CARD).write_text(card_of(result), encoding="utf-8")
        record = record_of(result, partial_folder, time.perf_counter() - began)
        (partial_folder / VOCABULARY).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        open_to_others(partial_folder)
    for name in lost:
        say(f"note: {name} of the dense model is left out; tokenizer.json stands for it")
    quoted = shlex.quote(str(output))
    say(f"written to {output}; prune it like any model: python -m multipruner --model {quoted} --ratio 0.2")
    tell(console, "result", folder=str(output), parameters=record["parameters"], tokens=record["tokens"])
    return record


def _dense(source: ResolvedModel, recipe: Recipe, wanted: Wanted, console: Console) -> _Dense:
    """Check the dense model, and count the text's tokens."""
    say, trust = teller(console), trusts(recipe.trust_remote_code)
    with waiting_display(console, "checking"):
        found = accounted(source, recipe)
        record = serialised(found.tokenizer, found.name)
        kind = kind_of(record, found.name)
        model = deferred_model(found, trust)
        check_places(model, found.name)
    chat = recipe.calibration
    text = read_text(wanted.text, chat.text_column, wanted.text_tokens, found.tokenizer, chat.chat_template)
    say(text.line)
    with counting_display(console, "counting") as show:
        counts = count_tokens(found.tokenizer, text.counted, named(show, "counting"))
    settings = [json_object(path) for name in _SETTINGS if (path := found.folder / name).is_file()]
    special, named_there = special_ids(record), {one for each in settings for one in named_ids(each)}
    if wanted.drop_reserved:
        special = {
            number: name for number, name in special.items()
            if counts[number] or number in named_there or not any(word in name.lower() for word in _RESERVED)
        }  # fmt: skip
    needed = {*special, *named_there, *template_ids(found.tokenizer)}
    rows, _ = row_parameters(model)
    return _Dense(found, model, record, kind, text, counts, frozenset(one for one in needed if one < rows))


def _show_ladder(dense: _Dense, wanted: Wanted, console: Console) -> None:
    """Show what several sizes save and cost, the one that was asked for among them."""
    say = teller(console)
    most = dense.chosen(None, wanted.multiple)
    sizes = {len(most.ids): most}
    asked = [] if wanted.tokens is None else [wanted.tokens]
    for tokens in (*_LADDER, *asked):
        if most.needed <= tokens < len(most.ids):
            choice = dense.chosen(tokens, wanted.multiple)
            sizes[len(choice.ids)] = choice
    say(f"{most.needed:,} tokens stay whatever the text; the text has {most.seen:,} of {len(dense.kind.numbers):,}")
    say(f"{'tokens':>9}{'parameters':>14}{'fewer':>8}{'bytes a token':>15}{'more tokens':>13}{'as before':>11}")
    for _, choice in sorted(sizes.items(), reverse=True):
        say(dense.sizes(choice, dense.cut(choice)).row())


def _measured(
    source: ResolvedModel, recipe: Recipe, dense: _Dense, choice: Choice, cut: Mapping[str, Any], console: Console
) -> dict[str, tuple[float, float]]:
    """Return bits per byte of the dense model and of the smaller one, by text."""
    texts = {"held-out text": dense.text.held_out}
    try:
        name, text = wikitext_text(recipe.evaluation)
        texts[name] = text.split("\n")
    except CalibrationError as error:
        if recipe.evaluation.text is not None:
            raise
        teller(console)(f"{error}. Bits per byte are compared on the held-out text alone.")
    pieces = {name: pieces_of(rows, _PIECES) for name, rows in texts.items()}
    smaller = tokenizer_of(cut, dense.found.tokenizer)
    with waiting_display(console, "loading"):
        model, tokenizer = load_dense(source, recipe)
    found: dict[str, list[float]] = {name: [] for name in pieces}
    precision = Precision.of(model, recipe.compute_dtype)
    teller(console)(precision.line())
    for who, reader in (("dense", tokenizer), ("smaller", smaller)):
        if who == "smaller":
            keep_rows(model, choice.ids)
        with precision.computing(model), counting_display(console, who) as show:
            for name, parts in pieces.items():
                found[name].append(bits_per_byte(model, reader, parts, named(show, f"{who}, {name}")))
    return {name: (before, after) for name, (before, after) in found.items()}


def _write(
    folder: Path,
    dense: _Dense,
    smaller: PreTrainedModel,
    choice: Choice,
    cut: Mapping[str, Any],
    recipe: Recipe,
    console: Console,
) -> list[str]:
    """Write everything but the record, and hold it against what it should be; return the files that have no place."""
    found, numbers = dense.found, choice.numbers
    lost = write_files(folder, found.folder, found.tokenizer, cut, numbers)
    for name in _SETTINGS:
        if (found.folder / name).is_file():
            settings = renumbered(json_object(found.folder / name), numbers)
            if name == _SETTINGS[0]:
                settings["vocab_size"] = len(choice.ids)
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in found.folder.glob("*.py") if found.spec.remote_code else ():
        (folder / path.name).write_bytes(path.read_bytes())
    with bytes_display(console, "writing", weight_bytes(smaller)) as tick:
        write_weights(folder, smaller, SHARD_SIZE, tick)
    trust = trusts(recipe.trust_remote_code)
    check_written(folder, smaller, trust, opened=partial(AutoModelForCausalLM.from_pretrained, use_safetensors=True))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    rows = [*dense.text.held_out[:_TRIED]]
    for row, ids, wanted in zip(rows, encoded(tokenizer, rows), encoded(tokenizer_of(cut), rows), strict=True):
        if ids != wanted:
            raise OutputError(f"the written tokenizer tells a text otherwise than was chosen: {row[:60]!r}")
    return lost
