"""What a recipe or a flag chooses by name: one table each. Rows say where the code is; listing them loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError, did_you_mean

Where = str | Callable[..., Any]
"""``"module:function"``, or the function itself."""
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Importance:
    """An order of the channels and KV groups of a layer.

    Attributes:
        by: LayerView -> LayerRanking.
        moments: whether it looks at moments of calibration text.
    """

    by: Where
    moments: bool = False


@dataclass(frozen=True, slots=True)
class Export:
    """A file format of other programs.

    Attributes:
        by: (folder, output, options) -> what was written, which has ``lines(outtype)``.
        outtype: of the matrices, where none is asked for.
        options: further options that it takes; ``say`` is called with lines for a person.
        pictures: whether it takes image classifiers as well.
    """

    by: Where
    outtype: str
    options: tuple[str, ...] = ()
    pictures: bool = False


@dataclass(frozen=True, slots=True)
class Runtime:
    """A program that runs a finished model.

    Attributes:
        packages: what it needs, by the names of distributions; their modules are called the same, with underscores.
        export: the row of :data:`EXPORTS` that it opens; empty where it opens the folder itself.
        outtypes: of the matrices, those it is measured with; the first where none is asked for.
    """

    packages: tuple[str, ...]
    export: str = ""
    outtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """How a structure is found, and the settings that go with it.

    Attributes:
        by: (setting, workspace, console, say, overwrite) -> what was found.
        preset: what the recipe's keys are where nothing else is said.
        greedy: whether it goes step by step to a ratio, and so knows no other budgets.
    """

    by: Where
    preset: Mapping[str, Any]
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Where calibration text comes from.

    Attributes:
        by: (source, wanted, options) -> rows of text, or, where it gives token ids, (path, part, tokenizer, model) ->
            ids; ``None``: the dense model writes it.
        about: how help lists it; default: its name.
        brief: the same in a few words.
        takes: source -> whether it is of this kind; ``None`` where the source is the row's name.
        options: further arguments of ``by``.
        ids: whether it gives token ids rather than rows of text.
        or_own: whether text of the dense model's own takes its place where the Hub is out of reach.
    """

    by: Where | None
    about: str = ""
    brief: str = ""
    takes: Where | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ids: bool = False
    or_own: bool = False


IMPORTANCES: dict[str, Importance] = {
    "magnitude": Importance("multipruner.importance.orders:by_magnitude"),
    "activation": Importance("multipruner.importance.orders:by_activation", moments=True),
    "second-order": Importance("multipruner.importance.orders:by_second_order", moments=True),
    "none": Importance("multipruner.importance.orders:as_it_is"),
}
_NAMED = "multipruner.sources.rows:of_named_set"
TEXTS: dict[str, Text] = {
    "alpaca": Text(_NAMED, options={"path": "tatsu-lab/alpaca"}, or_own=True),
    "wikitext2": Text(_NAMED, options={"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "running": True}),
    "c4": Text(
        _NAMED,
        options={
            "path": "allenai/c4",
            "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
            "streaming": True,
        },
    ),
    "self": Text(None, "self (text sampled from the dense model)", "self (sampled from the model)"),
    "token ids": Text(
        "multipruner.sources.ready_ids:ready_ids",
        "a .safetensors file with ready token ids (tensor input_ids; heldout_ids for the comparison at the end; "
        "moments_ids for the moments, which are otherwise those of input_ids as well)",
        "ready token ids",
        takes="multipruner.sources.ready_ids:is_ready",
        ids=True,
    ),
    "files": Text(
        "multipruner.sources.rows:of_files",
        "a local file or folder of .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow (also .gz, .zst)",
        "local files",
        takes="multipruner.sources.rows:is_local",
    ),
    "data set": Text(
        "multipruner.sources.rows:of_data_set",
        "a data set of the Hub (owner/name[:config][:split][:column])",
        "a Hub id",
        takes="multipruner.sources.rows:is_data_set",
    ),
}
"""Sources that are called by name come first; of the others the first one that takes a source gets it."""
EXPORTS: dict[str, Export] = {
    "gguf": Export("multipruner.export.gguf:export_gguf", "f16", ("base_gguf", "quant", "say")),
    "onnx": Export("multipruner.export.onnx:export_onnx", "f32", ("trust_remote_code",), pictures=True),
    "openvino": Export("multipruner.export.openvino:export_openvino", "f16", ("trust_remote_code",)),
}
RUNTIMES: dict[str, Runtime] = {
    "transformers": Runtime(("transformers",)),
    "openvino": Runtime(("openvino", "openvino-genai"), "openvino", ("f16", "f32", "int8")),
    "llama.cpp": Runtime(("xllamacpp",), "gguf", ("f16", "f32", "bf16", "q8_0")),
}
"""Where latency can be measured."""
QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""What llama.cpp's own quantiser makes of a GGUF file."""
_PROGRAM, _GREEDY = "multipruner.jobs.prune.program:program", "multipruner.jobs.prune.greedy:greedy"
_OWN_TEXT = {"calibration": {"source": "self"}}
METHODS: dict[str, Method] = {
    "program": Method(_PROGRAM, _OWN_TEXT),
    "greedy": Method(_GREEDY, _OWN_TEXT, greedy=True),
    "paper": Method(
        _GREEDY,
        {"objective": "nll", "importance": "magnitude", "repair": "none", "effort": "balanced"},
        greedy=True,
    ),
}
"""The first is the default; how much each measures is an effort's row (:mod:`.effort`), and whatever is given
explicitly wins over both."""

TABLES: dict[str, str] = {
    "measured": "the loss of every block at half its width, one by one",
    "energies": "from one backward pass and the moments; in both, blocks that would go are measured without them",
}
"""Where the first tables of the exact program come from: name -> in a few words."""

LEVELS = ("error", "info", "debug")
"""What is said on the screen: nothing but errors; stages, decisions and results; libraries' words as well."""


def row_of(table: Mapping[str, Row], name: str, what: str) -> Row:
    """Return the row of a table.

    Args:
        table: by name.
        name: as asked for.
        what: of what kind the rows are, for the error.

    Raises:
        ConfigError: naming the closest, and all that there are.
    """
    if name not in table:
        raise ConfigError(f"no {what} {name!r}{did_you_mean(name, table)}; there are {', '.join(table)}")
    return table[name]


def loaded(where: Where) -> Callable[..., Any]:
    """Return the function that a row names, its module imported only now."""
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class OneOf:
    """Metadata of a text field: its value is a name of a table, also of one that has grown since.

    Attributes:
        table: by name.
        what: of what kind its rows are.
    """

    table: Mapping[str, Any]
    what: str

    def checked(self, name: object) -> object:
        """Return the name.

        Raises:
            ValueError: when the table has no such row; also for what is no text, such as a key left empty.
        """
        try:
            row_of(self.table, str("" if name is None else name), self.what)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.checked, handler(source))


@dataclass(frozen=True)
class ListsTexts:
    """Metadata of a text field: ``{texts}`` in what is said of it stands for the sources there are now."""

    table: Mapping[str, Text]

    def put_into(self, text: str, *, brief: bool = False) -> str:
        """Return a description with the list of sources in its place."""
        return text.replace("{texts}", listed_texts(self.table, brief=brief))


def listed_texts(table: Mapping[str, Text], *, brief: bool = False, ids: bool = True) -> str:
    """Return the sources of a table, for help.

    Args:
        table: by name.
        brief: whether in a few words each.
        ids: whether those of token ids are listed, too.
    """
    rows = {name: row for name, row in table.items() if ids or not row.ids}
    *others, last = [(row.brief if brief else row.about) or name for name, row in rows.items()]
    return f"{', '.join(others)} or {last}"


A_BUDGET = OneOf(COSTS, "budget")
