"""The one typed object that says what a pruning run does: for Python, YAML and the command line alike.

Precedence: what was typed (flags and ``--set``) > the recipe file > the catalogue's recipe > the effort's row > the
method's > the defaults below. An effort sets defaults, wherever it is named.
Nothing is merged twice: every source yields a plain mapping, the mappings are merged, and the result is validated once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from multipruner.core.axes import DIMENSIONS, Dimension
from multipruner.core.costs import COSTS, cost_named
from multipruner.core.errors import ConfigError

from .amounts import Dimensions, checked_blocks, names_of, parsed_shares
from .choices import A_BUDGET, IMPORTANCES, METHODS, TABLES, OneOf
from .counts import Rounds, Units
from .effort import DEFAULT, EFFORTS, costs, defaults_of, effort_of
from .faults import explained
from .fields import keys_of, shown
from .precedence import asked_ratio, merge_into
from .sections import CalibrationSpec, EvaluationSpec, Frozen, PackageSource
from .spellings import respelled, settle_method

__all__ = ["CalibrationSpec", "EvaluationSpec", "PackageSource", "Recipe"]

DType = Literal["auto", "bfloat16", "float16", "float32"]
MODEL, SIZE, METHOD = "model", "how much goes", "method"
PARTS, REPAIR = "what leaves, and with what", "repair, in closed form"
"""Headings of the flags."""


class Recipe(Frozen):
    """Everything a pruning run depends on."""

    name: str = Field(default="custom", description="name in the catalogue")
    description: str = Field(default="", description="one line for the list of recipes")
    model: str = Field(description="Hub id, local folder or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit", json_schema_extra=shown(MODEL, "REVISION"))
    fallback: PackageSource | None = Field(default=None, description="where the model is when the Hub is out of reach")
    trust_remote_code: bool = Field(False, description="run code the checkpoint brings", json_schema_extra=shown(MODEL))
    dtype: DType = Field("auto", description="type of weights; auto: the checkpoint's", json_schema_extra=shown(MODEL))
    compute_dtype: DType = Field(
        default="auto",
        description="type that is computed in, while the weights keep theirs on disk and in the result; auto: float32 "
        "where this machine multiplies it faster than the weights' own type",
        json_schema_extra=shown(MODEL),
    )
    device: str = Field(
        default="auto",
        description="cpu, cuda, cuda:1, ...; auto: the first GPU, else the CPU",
        json_schema_extra=shown(MODEL, "NAME", everyday=True),
    )
    offload: Literal["auto", "none", "disk"] = Field(
        "auto",
        description="disk: one layer at a time is in memory; auto: if memory is short",
        json_schema_extra=shown(MODEL),
    )
    max_host_memory: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GiB that a run may take; none: no bound", json_schema_extra=shown(MODEL, "NUMBER")
    )
    max_device_memory: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the same of a GPU's memory", json_schema_extra=shown(MODEL, "NUMBER")
    )

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=0.2,
        description="removed / all parameters; null: as the budgets say, or, where a plan is given, nothing is bounded",
        json_schema_extra=shown(SIZE, "RATIO", everyday=True),
    )
    budgets: dict[Annotated[str, A_BUDGET], str] = Field(
        default_factory=dict,
        description="upper bounds that hold together, for program: a number (12ms, 200MiB) or a share of the dense "
        "model (0.7x)",
        json_schema_extra=shown(SIZE),
    )
    latency_table: str | None = Field(
        default=None,
        description="what `multipruner latency` wrote: for a latency budget, and to time both models at the end",
        json_schema_extra=shown(SIZE, "FILE", everyday=True),
    )
    workload: str | None = Field(
        default=None,
        description="which of that table's workloads counts, such as prefill-b1-t512; its first where none is named",
        json_schema_extra=shown(SIZE, "NAME"),
    )
    method: Annotated[str, OneOf(METHODS, "method")] = Field(
        default="program",
        description="program: tables of measured losses and an exact integer program; greedy: one smallest step after "
        "another to the ratio; paper: greedy as published, a preset of its objective, importance, text and no repair",
        json_schema_extra=shown(METHOD, everyday=True),
    )
    effort: Annotated[str, OneOf(EFFORTS, "effort")] = Field(
        default=DEFAULT,
        description=f"how much text and how many rounds, where no key of their own says so ({costs()})",
        json_schema_extra=shown(METHOD, everyday=True, brief=f"how much is measured ({costs()})"),
    )
    rounds: Rounds = Field(
        2, description="times the program is solved again around its answer", json_schema_extra=shown(METHOD, "N")
    )
    tables: Annotated[str, OneOf(TABLES, "table")] = Field(
        default="measured",
        description=f"first tables of the program; {'; '.join(f'{name}: {text}' for name, text in TABLES.items())}",
        json_schema_extra=shown(METHOD),
    )
    refine: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="minutes for further rounds, until no exchange between blocks lowers the loss",
        json_schema_extra=shown(METHOD, "MINUTES"),
    )
    layout: Literal["blocks-free", "uniform"] = Field(
        "blocks-free", description="uniform: equal layers, a stock checkpoint", json_schema_extra=shown(METHOD)
    )
    objective: Literal["nll", "kl"] = Field(
        "kl", description="nll of the text, or kl: divergence from the dense model", json_schema_extra=shown(METHOD)
    )
    stages: Annotated[tuple[Dimension, ...], BeforeValidator(names_of)] = Field(
        DIMENSIONS, description="which dimension is pruned first, for greedy", json_schema_extra=shown(METHOD, "NAMES")
    )
    shares: Annotated[dict[Dimension, Annotated[float, Field(ge=0)]], BeforeValidator(parsed_shares)] = Field(
        default_factory=lambda: {"blocks": 44.0, "mlp": 52.0, "heads": 4.0},
        description="shares of the ratio that blocks:mlp:heads have, for greedy; mlp is experts, too",
        json_schema_extra=shown(METHOD, "BLOCKS:MLP:HEADS"),
    )
    stop: Literal["nearest", "reach"] = Field(
        default="nearest",
        description="when a dimension ends: nearest to its share, or the first step that reaches it, for greedy",
        json_schema_extra=shown(METHOD),
    )
    shortlist: Units | None = Field(
        default=None,
        description="candidates that a step measures, those that looked best when last measured, for greedy; none: all",
        json_schema_extra=shown(METHOD, "N"),
    )
    importance: Annotated[str, OneOf(IMPORTANCES, "importance")] = Field(
        "second-order", description="what puts the units of a block in order", json_schema_extra=shown(PARTS)
    )
    align: Units | None = Field(
        default=None,
        description="cut widths of matrices are multiples of this, such as 64 for tensor cores",
        json_schema_extra=shown(PARTS, "N"),
    )
    channel_group: Units = Field(
        128, description="MLP channels that leave together", json_schema_extra=shown(PARTS, "N")
    )
    partial_groups: bool = Field(
        default=False,
        description="allow channel groups that do not divide the MLP width (as the paper's recipes do): groups leave "
        "from the end, and the one that stays at least is the larger",
        json_schema_extra=shown(PARTS),
    )
    kv_group_step: Units = Field(1, description="KV groups that leave together", json_schema_extra=shown(PARTS, "N"))
    query_head_step: Units | None = Field(
        None, description="query heads that leave together; none: they stay", json_schema_extra=shown(PARTS, "N")
    )
    value_dim_step: Units | None = Field(
        None, description="value dimensions that leave together; none: they stay", json_schema_extra=shown(PARTS, "N")
    )
    rope_pair_step: Units | None = Field(
        None, description="RoPE pairs that leave together; none: they stay", json_schema_extra=shown(PARTS, "N")
    )
    expert_step: Units = Field(
        1, description="experts that leave together; as many stay as a token takes", json_schema_extra=shown(PARTS, "N")
    )
    dimensions: Dimensions = Field(
        DIMENSIONS, description="dimensions that may shrink, for program", json_schema_extra=shown(PARTS, "NAMES")
    )
    freeze: Annotated[str, BeforeValidator(checked_blocks)] | None = Field(
        None, description="blocks that stay whole, such as 0,29,mlp:1-3", json_schema_extra=shown(PARTS, "BLOCKS")
    )
    hidden_size: Units | Literal["auto"] | None = Field(
        default=None,
        description="width of the residual stream, for program; auto: narrower while the loss falls, or, of those in a "
        "latency table, the best; none: as it is",
        json_schema_extra=shown(PARTS, "N|auto"),
    )
    rotate: Literal["auto", "on", "off"] = Field(
        "auto", description="turn the stream before dimensions leave; auto: if possible", json_schema_extra=shown(PARTS)
    )
    hidden_step: Units = Field(32, description="hidden sizes are multiples of N", json_schema_extra=shown(PARTS, "N"))
    repair: Literal["none", "bias", "lstsq"] = Field(
        default="lstsq",
        description="the closed-form repair; lstsq: what stays of an output projection, and its bias where it has one, "
        "is refitted to what all of it gave; bias: only the bias takes over the mean of what left, in models whose "
        "output projections have one",
        json_schema_extra=shown(REPAIR),
    )
    ridge: Annotated[float, Field(gt=0)] = Field(
        1e-2, description="ridge of lstsq, relative to the mean moment", json_schema_extra=shown(REPAIR, "NUMBER")
    )
    repair_stage: Literal["search", "final"] = Field(
        default="search",
        description="search: candidates are scored with their repair; final: only the result is repaired",
        json_schema_extra=shown(REPAIR),
    )
    accumulate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="last repair: share of the error of the blocks before that every block makes good; 0: none",
        json_schema_extra=shown(REPAIR, "SHARE"),
    )
    accumulate_ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=0.2,
        description="ridge of the last repair, relative to the mean moment; auto: every row of a matrix takes the one "
        "that a held-out quarter of the text prefers, or stays as it is where none helps there",
        json_schema_extra=shown(REPAIR, "NUMBER|auto"),
    )
    final_norm: Literal["refit", "keep"] = Field(
        "refit", description="refit: the last repair ends with the last norm's gain", json_schema_extra=shown(REPAIR)
    )
    moments: Literal["memory", "disk"] = Field(
        default="memory",
        description="where second moments are; disk: in a file in the cache folder, in memory only what is in use",
        json_schema_extra=shown(REPAIR),
    )
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    @field_validator("stages", "shares")
    @classmethod
    def _check_dimensions(cls, value: Any) -> Any:
        every = sorted(value) == sorted(DIMENSIONS)
        if isinstance(value, dict) and not (every and 0 < sum(value.values()) < float("inf")):
            raise ValueError("give three shares blocks:mlp:heads that add up to more than 0, such as 44:52:4")
        if not every:
            raise ValueError(f"name each of {', '.join(DIMENSIONS)} once, such as 'blocks,mlp,heads'")
        return value

    @model_validator(mode="after")
    def _check_budgets(self) -> Recipe:
        if self.greedy and (self.budgets or self.ratio is None or self.latency_table is not None):
            raise ValueError(f"--method {self.method} knows a ratio only; budgets need --method program")
        if self.greedy and self.dimensions != DIMENSIONS:
            raise ValueError("--dimensions needs --method program; a greedy one has --shares, with 0 for what stays")
        if any(cost_named(name).needs_table for name in self.budgets) and self.latency_table is None:
            raise ValueError("a latency budget needs a latency table (multipruner latency makes tables)")
        if self.hidden_size is not None and self.greedy:
            raise ValueError("--hidden-size needs --method program")
        return self

    @classmethod
    def build(cls, *sources: Mapping[str, Any]) -> Recipe:
        """Merge plain mappings, later ones winning, and validate once.

        Budgets without a ratio replace the ratio of the sources before, and its default. Old names are accepted with
        a warning (:mod:`.spellings`).

        Raises:
            ConfigError: listing every fault at once, one line each.
        """
        given: dict[str, Any] = {}
        for source in sources:
            merge_into(given, respelled("recipe", source))
        given["ratio"] = asked_ratio(sources, cls.model_fields["ratio"].default)
        preset = str(given.get("method", next(iter(METHODS))))
        settle_method(given)
        merged = defaults_of(preset, str(given.get("effort", effort_of(preset))))
        merge_into(merged, given)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise ConfigError(explained(error, keys_of(cls))) from None

    def check_bounded(self) -> None:
        """Refuse to prune by no budget at all, which is for recipes of what is measured or given.

        Raises:
            ConfigError: when there is neither a ratio nor a budget.
        """
        if self.ratio is None and not self.budgets:
            raise ConfigError(f"how much goes? give --ratio R, or one of {', '.join(c.flag for c in COSTS.values())}")

    @property
    def greedy(self) -> bool:
        """Whether the structure is found step by step."""
        return METHODS[self.method].greedy

    @property
    def on_curves(self) -> bool:
        """Whether losses between measured widths follow the errors of repaired outputs, which moments tell."""
        return self.repair != "none" and self.repair_stage == "search"

    @property
    def estimated(self) -> bool:
        """Whether the first tables are estimated: where candidates are scored with their repair."""
        return self.tables == "energies" and self.on_curves and not self.greedy

    @property
    def text(self) -> CalibrationSpec:
        """The calibration section, without sequences for moments where nothing needs moments."""
        needed = self.repair != "none" or IMPORTANCES[self.importance].moments
        return self.calibration if needed else self.calibration.model_copy(update={"moments_sequences": 0})

    def shares_text(self) -> str:
        """Return the shares as they are typed, ``"44:52:4"``."""
        return ":".join(f"{self.shares[dimension]:g}" for dimension in DIMENSIONS)
