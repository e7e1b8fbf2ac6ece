"""lm-eval tasks on a model in memory, with what every single document scored."""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from multipruner.core.errors import CalibrationError, ConfigError, NumericsError, did_you_mean
from multipruner.eval.floors import floor_of
from multipruner.eval.inference import inference
from multipruner.eval.results import MetricResult, TaskResult, TaskResults
from multipruner.storage.hub import offline_unless_hub_answers

# lm-eval's search for the largest batch tries 64 rows of the longest context first and waits for memory to run out,
# which is no way to treat a CPU; so a fixed number there
_BATCH_SIZE = 16
# draws for the standard error of metrics without a closed form; lm-eval's default is 100,000
_BOOTSTRAP = 1000
_COUNTING = ("acc", "exact_match", "prompt_level", "inst_level")
"""How the names of metrics that are shares of right answers begin."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    chat: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResults:
    """Run lm-eval tasks, groups, tags or patterns such as ``mmlu_*`` with their stock prompts and metrics.

    Args:
        model, tokenizer: a causal language model and its tokenizer; both are as before afterwards.
        tasks: names that lm-eval knows, or that ``include_path`` defines.
        include_path: a folder with further task files, which win over stock ones of the same name.
        limit: the first so many documents per task.
        batch_size: rows per forward pass; ``"auto"`` is lm-eval's search on CUDA and 16 elsewhere.
        chat: whether prompts are put into the tokenizer's chat template, examples as turns of their own.
        progress: called with (requests answered, requests in all), from 0 on; generated text, log-likelihoods
            and those of whole texts are counted apart.

    Returns:
        Results by task; a group that lm-eval aggregates stands for its members.

    Raises:
        ConfigError: for an unknown task, with the closest name, or a missing ``include_path``.
        CalibrationError: when a task's documents cannot be had.
        NumericsError: when the model answers with NaN.
    """
    manager, names = resolve_tasks(tuple(tasks), include_path)
    if batch_size == "auto" and model.device.type != "cuda":
        batch_size = _BATCH_SIZE
    with ExitStack() as stack:
        stack.enter_context(offline_unless_hub_answers())
        stack.enter_context(_random_state_restored())
        stack.enter_context(inference(model))
        stack.enter_context(_silence())
        output = _simple_evaluate(model, tokenizer, manager, names, limit, batch_size, chat, progress)
    _refuse_nan(output["samples"])
    return _read(output, names)


def _simple_evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    names: list[str],
    limit: int | None,
    batch_size: int | str,
    chat: bool,
    progress: Callable[[int, int], None],
) -> Mapping[str, Any]:
    import lm_eval

    from multipruner.eval.requests import CountingLM

    run = cast("Any", lm_eval.simple_evaluate)  # decorators hide its signature
    # HFLM gives a tokenizer without a padding token one, and that would end up in the saved checkpoint
    wrapped = CountingLM(progress, pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    output = run(
        model=wrapped,
        tasks=_load(manager, names),
        limit=limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=True,
        task_manager=manager,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    if output is None:
        raise ConfigError("evaluation runs in one process: start it without accelerate launch or torchrun")
    return output


def _load(manager: Any, names: list[str]) -> list[Any]:
    """Return task and group objects, each task once, although a pattern may match a group and its members."""
    groups: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # datasets raises anything, and the network has errors of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CalibrationError(
                f"the documents of task {name!r} cannot be had ({reason}): connect to the Hub, "
                "or name local tasks and their folder (evaluation.include_path, --include-path)"
            ) from error
        if name in loaded["groups"]:
            groups[name] = loaded["groups"][name]
        else:
            tasks |= loaded["tasks"]
    inner = {sub.name for name, group in groups.items() for sub in group.get_all_groups() if sub.name != name}
    covered = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    outer = [group for name, group in groups.items() if name not in inner]
    return outer + [task for name, task in tasks.items() if name not in covered]


def resolve_tasks(tasks: tuple[str, ...], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """Return a task manager that knows all tasks, and their names with patterns expanded."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"evaluation.include_path = {str(include_path)!r} is no folder with lm-eval task files")
    folder = None if include_path is None else str(Path(include_path).resolve())
    # reading lm-eval's own 14,000 task files takes seconds: not when the folder has all that is asked for (groups and
    # tags may have stock members)
    manager = _manager(folder, defaults=folder is None)
    matches = [set(manager.match_tasks([task])) for task in tasks]
    if not all(matches) or not set().union(*matches) <= set(manager.all_subtasks):
        manager = _manager(folder, defaults=True)
    found = {task: manager.match_tasks([task]) for task in tasks}
    if all(found.values()):
        return manager, list(dict.fromkeys(name for names in found.values() for name in names))
    unknown = next(task for task, names in found.items() if not names)
    raise ConfigError(
        f"unknown task {unknown!r}{did_you_mean(unknown, ['ppl', *manager.all_tasks])}: ppl, a task of lm-eval "
        "(`lm-eval ls tasks` lists them) or one in evaluation.include_path is expected"
    )


@lru_cache(maxsize=4)
def _manager(folder: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the random state: lm-eval seeds the global generators (some tasks shuffle their choices); a run's own
    draws must not notice.
    """
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what lm-eval, datasets and the commands that they start print; exceptions come through."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        # lm-eval offers no switch for its bars
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), _children_silenced():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _children_silenced() -> Iterator[None]:
    """Send the process's standard error nowhere: lm-eval asks git for a commit, which complains outside of one."""
    try:
        kept = os.dup(2)
    except OSError:  # a process without standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _refuse_nan(documents: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    # the best of several NaN is the first answer: without this check a broken model scores as if it had guessed
    for task, samples in documents.items():
        for sample in samples:
            if any(_is_nan(answer) for answer in sample["filtered_resps"]):
                raise NumericsError(
                    f"task {task!r}, document {sample['doc_id']}: the model's log-likelihood is NaN; "
                    "evaluate in bfloat16 or float32, and check the perplexity"
                )


def _is_nan(answer: Any) -> bool:
    """Tell whether one of lm-eval's answers, a log-likelihood alone or with whether it is greedy, is NaN."""
    score = answer[0] if isinstance(answer, (tuple, list)) and answer else answer
    return isinstance(score, float) and math.isnan(score)


def _read(output: Mapping[str, Any], names: list[str]) -> dict[str, TaskResult]:
    """Return lm-eval's results, groups first; a member of a group that is shown is not shown again."""
    groups = [name for name in names if name in output.get("groups", {})]
    members = {group: _members(group, output) for group in groups}
    covered = {name for leaves in members.values() for name in leaves}
    results = {}
    for group in groups:
        examples = [(f"{name}/", sample) for name in members[group] for sample in output["samples"][name]]
        results[group] = TaskResult(_metrics(output["groups"][group], examples, floor_of(output, members[group])))
    for name in output["samples"]:
        if name not in covered:
            samples = [("", sample) for sample in output["samples"][name]]
            metrics = _metrics(output["results"][name], samples, floor_of(output, [name]))
            version = output["versions"].get(name)
            results[name] = TaskResult(metrics, None if version is None else str(version), output["n-shot"].get(name))
    return results


def _members(group: str, output: Mapping[str, Any]) -> list[str]:
    """Return the tasks in a group and its subgroups."""
    children = output["group_subtasks"].get(group)
    if children is None:
        return [group] if group in output["samples"] else []
    return [name for child in children for name in _members(child, output)]


def _metrics(
    row: Mapping[str, Any], examples: list[tuple[str, Mapping[str, Any]]], floor: float | None
) -> dict[str, MetricResult]:
    """Return the metrics in one row of lm-eval's results, whose keys are ``metric,filter`` and
    ``metric_stderr,filter``; those that count right answers get the floor.
    """
    results = {}
    for key, value in row.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = row.get(f"{metric}_stderr,{filter_name}")
        scores = {
            f"{prefix}{sample['doc_id']}": float(sample[metric])
            for prefix, sample in examples
            if sample["filter"] == filter_name and isinstance(sample.get(metric), (bool, int, float))
        }
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        known = float(stderr) if isinstance(stderr, (int, float)) else None
        counts = metric.startswith(_COUNTING)
        found = scores if _is_mean(float(value), scores) else {}
        results[name] = MetricResult(float(value), known, found, floor if counts else None)
    return results


def _is_mean(value: float, scores: Mapping[str, float]) -> bool:
    return bool(scores) and math.isclose(math.fsum(scores.values()) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9)
