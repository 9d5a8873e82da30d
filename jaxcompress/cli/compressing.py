"""`compress` and `plan`: a model into one file, by recipe or by size."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import reporting, storage
from jaxcompress.calibration.blockwise import compress_blockwise
from jaxcompress.cli import running
from jaxcompress.cli.dry_run import forecast_, sizes_
from jaxcompress.cli.recipes import DEFAULT, names_stacks, read_recipe, stages_of
from jaxcompress.models.loading import load
from jaxcompress.models.saved import save
from jaxcompress.reporting import grouped
from jaxcompress.shrinking import calibration
from jaxcompress.shrinking.efforts import choose_effort
from jaxcompress.shrinking.goals import parse_goal
from jaxcompress.shrinking.shrink import plan_recipe, shrink
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.store import Store
from jaxcompress.shrinking.subject import read_subject, stacked
from jaxcompress.storage.resume import digest
from jaxcompress.tracing.layouts import find_layouts
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.record import LeafReport
from jaxcompress.types import Params

CODING = ("entropy_code()", "code_floats()")
GOALS = ("size", "bits_per_weight", "kl")


def compress_(options: argparse.Namespace) -> None:
    goal = goal_of(options)
    if goal and (options.recipe or options.recipe_file or options.blockwise):
        raise ValueError(
            "--size, --bits-per-weight and --kl choose the recipe; leave out --recipe, "
            "--recipe-file and --blockwise, or leave out the goal"
        )
    if options.no_coding and (goal or options.coded_in_memory):
        other = "--coded-in-memory"
        if goal:
            (name,) = goal
            other = f"--{name.replace('_', '-')}, which chooses coded levels"
        raise ValueError(f"--no-coding excludes {other}; leave one out")
    if options.recipe and options.recipe_file:
        raise ValueError("give --recipe or --recipe-file, not both")
    if goal:
        _by_goal(options, goal)
        return
    if options.recipe_file:
        stages, recipe = read_recipe(options.recipe_file)
    else:
        recipe = options.recipe or [DEFAULT]
        stages = stages_of(recipe)
    if options.dry_run:
        sizes_(options, stages, recipe)
        return
    _by_recipe(options, stages, recipe)


def goal_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the goal of the options, by the keyword of `shrink`; empty without one."""
    goals = {name: getattr(options, name, None) for name in GOALS}
    goals = {name: value for name, value in goals.items() if value is not None}
    if len(goals) > 1:
        names = ", ".join("--" + name.replace("_", "-") for name in goals)
        raise ValueError(f"give one goal, not {names}")
    return goals


def _by_goal(options: argparse.Namespace, goal: dict[str, Any]) -> None:
    if options.dry_run:
        forecast_(options, goal)
        return
    start = time.perf_counter()
    parse_goal(*(goal.get(name) for name in GOALS), weights=1)
    model, params, tokenizer = load(options.model)
    _check_tokenizer(options, tokenizer)
    small = shrink(
        *stacked(model, params),
        tokenizer,
        **goal,
        text=None if options.calibrate is None else Path(options.calibrate),
        effort=options.effort,
        store=options.store,
        key=jax.random.key(options.seed),
        progress=not options.quiet,
        metadata={"source": str(options.model)},
    )
    small.save(options.out)
    options.written = options.out
    running.show(
        reporting.leaf_table(
            small.report.rows, small.report.file_bytes, largest=options.leaves
        ),
        "",
        str(small),
        _written(options, small.tokenizer),
    )
    row = {
        "model": str(options.model),
        "goal": goal,
        "effort": options.effort,
        "recipe": [list(rule) for rule in small.recipe],
        "file_bytes": Path(options.out).stat().st_size,
        "bits_per_weight": small.bits_per_weight,
        "kl": small.kl,
        "kl_standard_error": small.kl_standard_error,
        "predicted_kl": small.predicted_kl,
        "candidates": small.candidates,
        "notes": list(small.notes),
        "stages": small.stages,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": reporting.peak_memory(),
    }
    if options.text:
        before = running.to_run(small.subject.model, small.subject.params)
        after = running.to_run(small.model, small.params)
        report = running.compare_on_text(options, *before, *after, small.tokenizer)
        row["text"] = report.to_dict()
    _append(options, row)


def _check_tokenizer(options: argparse.Namespace, tokenizer: Any) -> None:
    """Raise ValueError where a text is given that nothing reads."""
    if tokenizer is None and (options.text or options.calibrate):
        given_option = "--text" if options.text else "--calibrate"
        raise ValueError(
            f"{options.model} has no tokenizer, which {given_option} needs; add its "
            "files to the directory, or leave the option out"
        )


def _by_recipe(
    options: argparse.Namespace, stages: list[Any], recipe: list[Any]
) -> None:
    seconds = {}
    clock = time.perf_counter()
    model, params, tokenizer = load(options.model, scan=False)
    _check_tokenizer(options, tokenizer)
    layouts = None
    if names_stacks(stages):
        model, params = stacked(model, params)
        batch = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        layouts = find_layouts(model, params, batch)
    seconds["load"] = time.perf_counter() - clock
    clock = time.perf_counter()
    progress = running.progress(options)
    moments, batches = _moments(options, model, params, tokenizer)
    reports: list[LeafReport] = []
    try:
        if options.blockwise:
            small = compress_blockwise(
                model,
                params,
                chain(*stages),
                batches,
                store=options.store,
                record=reports,
                progress=not options.quiet,
            )
        else:
            small = compress(
                params,
                chain(*stages),
                moments,
                layouts=layouts,
                record=reports,
                progress=progress("compressing"),
            )
    except ValueError as error:
        if "collect_moments" in str(error) and not options.calibrate:
            text = str(error).split("; pass moments=")[0]
            raise ValueError(
                f"{text}; give a text to measure them on: --calibrate FILE"
            ) from error
        raise
    stored = small
    if options.coded_in_memory:
        stored = compress(small, chain(*CODING), progress=progress("coding"))
    seconds["compress"] = time.perf_counter() - clock
    clock = time.perf_counter()
    metadata = {"source": str(options.model), "recipe": recipe}
    coding = "none" if options.no_coding else "size"
    save(options.out, model, stored, tokenizer, metadata, coding=coding)
    options.written = options.out
    seconds["save"] = time.perf_counter() - clock
    with storage.open_checkpoint(options.out) as file:
        inside = {name: file.nbytes(name) for name in file.names}
        files = [each.path for each in file.files()]
    inside = {name.removeprefix("params/"): size for name, size in inside.items()}
    size = reporting.measure(stored, *files)
    row = {
        "model": str(options.model),
        "recipe": recipe,
        "weights": size.weights,
        "memory_bytes_before": nbytes(params),
        "memory_bytes_after": size.memory_bytes,
        "file_bytes": size.file_bytes,
        "bits_per_weight": size.bits_per_weight,
        "seconds": seconds,
    }
    running.show(
        reporting.leaf_table(reports, inside, largest=options.leaves),
        "",
        f"{grouped(size.file_bytes)} bytes, {size.bits_per_weight:.3f} bits per weight "
        "in all",
        _written(options, tokenizer),
    )
    if not options.recipe and not options.recipe_file:
        running.show(
            f"{DEFAULT} is the default; for less: --size 60MB, --bits-per-weight 3 or "
            "--recipe"
        )
    if options.text:
        before, after = running.to_run(model, params), running.to_run(model, small)
        report = running.compare_on_text(options, *before, *after, tokenizer)
        row["text"] = report.to_dict()
    row["peak_memory_bytes"] = reporting.peak_memory()
    spent = ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items())
    peak = row["peak_memory_bytes"]
    running.show(f"{spent}; peak memory {peak / 2**20:.0f} MiB" if peak else spent)
    _append(options, row)


def _written(options: argparse.Namespace, tokenizer: Any) -> str:
    replaced = "replaced" if getattr(options, "replaced", False) else "written"
    inside = "tokenizer included" if tokenizer is not None else "without a tokenizer"
    return f"{options.out}: {replaced}, {inside}"


def _append(options: argparse.Namespace, row: dict[str, Any]) -> None:
    if options.json:
        reporting.append_lines(options.json, [row])


def _moments(
    options: argparse.Namespace, model: Any, params: Params, tokenizer: Any
) -> tuple[Any, Any]:
    """Measure what `--calibrate` asks for, for recipes; return batches alone for block
    by block.
    """
    if not options.calibrate:
        if options.blockwise:
            raise ValueError("--blockwise needs a text: --calibrate FILE")
        return None, None
    effort = choose_effort("good" if options.effort == "quick" else options.effort)
    subject, store = read_subject(model, params, tokenizer), Store(options.store)

    stages = Stages(not options.quiet)
    data = calibration.language_data(
        subject, Path(options.calibrate), effort, store, "", stages, jax.random.key(0)
    )
    if options.blockwise:
        return None, list(data.batches)
    weights_digest = digest(None, params) if options.store else ""
    key = jax.random.key(options.seed)
    return calibration.calibrate(
        subject, data, {}, effort, store, weights_digest, stages, key
    ), data.batches


def plan(options: argparse.Namespace) -> None:
    goal = goal_of(options)
    if not goal or "kl" in goal:
        raise ValueError("plan needs --size or --bits-per-weight; --kl needs compress")
    rules, about = plan_recipe(
        options.model,
        **goal,
        text=None if options.calibrate is None else Path(options.calibrate),
        effort=options.effort,
        store=options.store,
        key=jax.random.key(options.seed),
        progress=not options.quiet,
    )
    text = json.dumps({"model": options.model, "goal": goal, **about, "recipe": rules})
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
        options.written = options.out
    else:
        print(text)
