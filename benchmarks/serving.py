"""A dense model against a pruned one in the programs that serve them: prompt and decoding, and whether they agree.

    python benchmarks/serving.py --work DIR [--model llama] [--pruned FOLDER] [--runtimes transformers,openvino]
        [--batches 1,8] [--prompt 512] [--tokens 128] [--repeats 5] [--exact] [--vllm PYTHON] [--record FILE]

``NAME:TYPE`` is a runtime with another type of weights than its first, such as ``llama.cpp:q8_0``; one that is not
installed is named and left out. vLLM needs an environment of its own, such as ``.ci/vllm`` makes (``build/vllm``):
``--vllm build/vllm/bin/python``. Without ``--pruned`` the model is cut to a random structure: time does not depend on
what the weights are. Dense and pruned stand open side by side and are sampled in turn; a prompt is timed from the call
to the first token, decoding by the time between tokens.

Equality: at 64 places of a text, how often the likeliest token is the one of transformers in 32 bits on the same
weights, and the mean difference of its log-probability, with the settings that were timed: on a processor with bfloat16
OpenVINO computes in it, unless ``--exact`` asks for 32 bits.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import results
import torch
from latency_structures import plan_of, random_structure, smaller_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.config.choices import EXPORTS, RUNTIMES, loaded
from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import ConfigError, MultiprunerError
from multipruner.core.latency_table import USUAL, Workload
from multipruner.engine.prunable import Prunable
from multipruner.latency.summarise import relative_iqr
from multipruner.latency.timing import Runner, alternating, quiet_process
from multipruner.recipes import mapping_for
from multipruner.runtimes.served import WORKER, Served, row_for, settings_for
from multipruner.runtimes.worker import STEPS
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

VLLM = "vllm"
HERE = Path(__file__).parent
COLUMNS = (
    ("runtime", "{}"), ("weights", "{}"), ("workload", "{}"), ("dense, ms", "{:.1f} ± {:.0%}"),
    ("pruned, ms", "{:.1f} ± {:.0%}"), ("pruned / dense", "{:.2f}"),
    ("same first choice, dense / pruned", "{:.0%} / {:.0%}"), ("log-probability off by", "{:.1e} / {:.1e}"),
)  # fmt: skip
BEGIN, PLACES = 8, 64
TEXT = HERE.parent / "README.md"


class Model(Protocol):
    """What is timed and asked."""

    def sample(self, workload: Workload) -> float: ...
    def choices(self, ids: Sequence[int], begin: int) -> list[tuple[int, float]]: ...
    def close(self) -> None: ...


class InProcess:
    """A folder as plain transformers open it, in 32 bits."""

    def __init__(self, folder: Path) -> None:
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        self._model: PreTrainedModel = opened.eval()
        self._runners: dict[Workload, Runner] = {}

    def sample(self, workload: Workload) -> float:
        with quiet_process():
            runner = self._runners.setdefault(workload, Runner(self._model, workload))
            return statistics.median(runner.sample() for _ in range(STEPS if workload.phase == "decode" else 1))

    def choices(self, ids: Sequence[int], begin: int) -> list[tuple[int, float]]:
        return exact_choices(self._model, ids, begin)

    def close(self) -> None:
        self._runners.clear()


@torch.no_grad()
def exact_choices(model: Any, ids: Sequence[int], begin: int) -> list[tuple[int, float]]:
    """The likeliest token after every beginning, and its log-probability."""
    logs = model(input_ids=torch.tensor([ids])).logits[0, begin - 1 :].double().log_softmax(-1)
    return [(int(row.argmax()), float(row.max())) for row in logs]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is exported")
    parser.add_argument("--model", default="llama")
    parser.add_argument("--pruned", type=Path, metavar="FOLDER", help="of a finished run of this model")
    parser.add_argument("--ratio", type=float, default=0.2, help="without --pruned: the share that leaves at random")
    parser.add_argument("--runtimes", default=",".join([*RUNTIMES, VLLM]))
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="in the cache where decoding is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--exact", action="store_true", help="in 32 bits, also where a program would choose fewer")
    results.flag(parser)
    return parser.parse_args(arguments)


def folders_of(typed: argparse.Namespace) -> dict[str, Path]:
    """The dense model's folder and the pruned one's."""
    recipe = Recipe.build(mapping_for(typed.model), {"dtype": "float32", "device": "cpu"})
    model, tokenizer = load_dense(resolve(recipe, print), recipe)
    prunable = Prunable.of(model)
    models = {"dense": (model, plan_of(model, prunable.dense, prunable.anatomy))}
    if typed.pruned is None:
        structure = random_structure(prunable.costs, typed.ratio, random.Random(0), 128)
        models["pruned"] = smaller_model(model, structure, prunable.anatomy)
    found = {} if typed.pruned is None else {"pruned": typed.pruned}
    for name, (one, plan) in models.items():
        found[name] = save(typed.work / name, one, tokenizer, plan=plan, report={}, card="", replace=True)
    return dict(sorted(found.items()))


def opened(runtime: str, outtype: str, folder: Path, settings: Mapping[str, int], typed: argparse.Namespace) -> Model:
    """A folder, or what is exported of it, ready to be timed."""
    if runtime == USUAL:
        return InProcess(folder)
    if runtime == VLLM:
        line = [typed.vllm, "-E", str(HERE / "serving_vllm.py"), str(WORKER.parent), VLLM]
        return Served(line, folder, settings)
    place = typed.work / f"{folder.name}-{outtype}.{runtime}"
    row = EXPORTS[RUNTIMES[runtime].export]
    path = loaded(row.by)(folder, place, outtype=outtype, overwrite=True).path
    return Served.opened(runtime, path, settings)


def asked_for(typed: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Runtimes with their types, and those that are not here with the reason."""
    there: list[tuple[str, str]] = []
    missing: dict[str, str] = {}
    for name, _, outtype in (each.partition(":") for each in typed.runtimes.split(",")):
        if name == VLLM and not typed.vllm:
            missing[name] = "no --vllm PYTHON was given"
        elif name in (USUAL, VLLM):
            there.append((name, "f32"))
        else:
            try:
                there.append((name, row_for(name, outtype or None)[1]))
            except ConfigError as error:
                missing[name] = str(error)
    return there, missing


def equality(models: Mapping[str, Model], exact: Mapping[str, list[tuple[int, float]]], ids: list[int]) -> list[Any]:
    """Shares of equal first choices, and mean differences of their log-probabilities where they are equal."""
    shares, differences = [], []
    for name, model in models.items():
        pairs = list(zip(model.choices(ids, BEGIN), exact[name], strict=True))
        same = [abs(one[1] - two[1]) for one, two in pairs if one[0] == two[0]]
        shares.append(len(same) / len(pairs))
        differences.append(statistics.fmean(same) if same else float("nan"))
    return [shares, differences]


def rows_of(
    runtime: str, outtype: str, models: Mapping[str, Model], workloads: Sequence[Workload], repeats: int
) -> Iterator[list[results.Cell]]:
    """A row for every workload."""
    for workload in workloads:
        takes = {name: lambda m=model, w=workload: m.sample(w) for name, model in models.items()}
        found = alternating(takes, repeats)
        cells = [[statistics.median(found[name]), relative_iqr(found[name])] for name in ("dense", "pruned")]
        ratio = statistics.median(p / d for p, d in zip(found["pruned"], found["dense"], strict=True))
        yield [runtime, outtype, workload.name, *cells, ratio, None, None]


def main(arguments: Sequence[str] | None = None) -> int:
    quiet_libraries()
    typed = parsed(arguments)
    torch.set_num_threads(typed.threads)
    batches = [int(each) for each in typed.batches.split(",")]
    workloads = [Workload("prefill", batch, typed.prompt) for batch in batches]
    workloads += [Workload("decode", batch, typed.tokens) for batch in batches]
    there, missing = asked_for(typed)
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})", flush=True)
    load_before, folders, rows = os.getloadavg()[0], folders_of(typed), []
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["dense"])
    ids = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids[: BEGIN + PLACES - 1]
    exact = {"dense": exact_choices(InProcess(folders["dense"])._model, ids, BEGIN)}
    exact["pruned"] = exact_choices(load(folders["pruned"], dtype=torch.float32).eval(), ids, BEGIN)
    settings = settings_for(workloads, len(tokenizer), typed.threads, exact=typed.exact)
    for runtime, outtype in there:
        with ExitStack() as stack:
            try:
                models = {name: stack.enter_context(closing(opened(runtime, outtype, folder, settings, typed)))
                          for name, folder in folders.items()}  # fmt: skip
                found = list(rows_of(runtime, outtype, models, workloads, typed.repeats))
                found[0][-2:] = equality(models, exact, ids)
            except MultiprunerError as error:
                missing[runtime] = str(error)
                print(f"left out: {runtime} ({error})", flush=True)
                continue
        for row in found:
            print(results.line(COLUMNS, row), flush=True)
        rows += found
    print(f"\n{results.markdown(COLUMNS, rows)}")
    pruned = str(typed.pruned or f"random, {typed.ratio:g}")
    setting = {"model": typed.model, "pruned": pruned, "repeats": typed.repeats, "threads": typed.threads,
               "exact": typed.exact, "places": PLACES, "load_before": load_before}  # fmt: skip
    results.record(typed.record, "serving", COLUMNS, rows, setting=setting, left_out=missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
