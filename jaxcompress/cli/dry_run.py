"""`compress --dry-run`: sizes, time and memory, from shapes alone."""

import argparse
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress import reporting
from jaxcompress.cli import running
from jaxcompress.cli.recipes import names_stacks
from jaxcompress.reporting import grouped
from jaxcompress.shrinking.estimates import describe_estimate
from jaxcompress.shrinking.forecast import forecast, read_shapes
from jaxcompress.shrinking.goals import parse_goal
from jaxcompress.shrinking.preparation import find_kernel_layouts
from jaxcompress.shrinking.search import KL_TRIES
from jaxcompress.tree.compress import compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.methods import describe, traits, unwrap
from jaxcompress.tree.paths import roots
from jaxcompress.tree.selection import bind
from jaxcompress.types import Params


def forecast_(options: argparse.Namespace, goal: dict[str, Any]) -> None:
    """Say what the goal would take, from shapes alone."""
    subject = read_shapes(options.model)
    wanted = parse_goal(
        goal.get("size"), goal.get("bits_per_weight"), goal.get("kl"), subject.weights
    )
    writes = not options.calibrate
    expected = forecast(subject, wanted, options.effort, writes=writes)
    lines = [f"{options.model}: {grouped(expected.weights)} weights"]
    if expected.file_bytes is not None and expected.planned_bytes is not None:
        bits = 8 * expected.file_bytes / expected.weights
        rate = 8 * expected.planned_bytes / expected.planned_weights
        lines += [
            f"planned size: at most {grouped(expected.file_bytes)} bytes, {bits:.3f} "
            "bits per weight in all",
            f"{grouped(expected.planned_bytes)} bytes of them for the "
            f"{grouped(expected.planned_weights)} weights that are quantized, "
            f"{rate:.3f} bits each on average",
        ]
    else:
        lines.append(
            f"the size is searched: the smallest file within {wanted.kl:g} nats that "
            f"{KL_TRIES} tries find"
        )
    running.show(
        *lines,
        f"effort {options.effort}: "
        + describe_estimate(expected.seconds, expected.memory_bytes),
        "Only shapes were read, and nothing was written. plan prints the recipe.",
    )
    row = {"model": str(options.model), "goal": goal, "effort": options.effort}
    row |= dataclasses.asdict(expected) | {"dry_run": True}
    if options.json:
        reporting.append_lines(options.json, [row])


def sizes_(options: argparse.Namespace, stages: list[Any], recipe: list[Any]) -> None:
    """Say what a recipe makes of each leaf.

    Raises:
      ValueError: a recipe whose sizes depend on values.
    """
    stack = names_stacks(stages)
    subject = read_shapes(options.model, stack=stack)
    params = subject.params
    layouts = find_kernel_layouts(subject, None) if stack else None
    small, rated = params, {}
    for stage in stages:
        small = _abstract(small, stage, layouts, rated, bool(options.calibrate))
    after = {name: nbytes(x) for name, x in roots(small)} | rated
    rows = [
        {
            "leaf": name,
            "shape": "x".join(map(str, old.shape)),
            "bytes before": nbytes(old),
            "after": after[name],
            "bits/weight": 8 * after[name] / max(1, old.size),
        }
        for name, old in roots(params)
    ]
    rows.sort(key=lambda row: -row["bytes before"])
    before, later = nbytes(params), sum(after.values())
    weights = reporting.weight_count(params)
    running.show(
        reporting.table(rows[: options.leaves]),
        f"{max(0, len(rows) - options.leaves)} more leaves" if rows else "",
        "",
        f"memory {grouped(before)} bytes before, {grouped(later)} "
        f"after: {8 * later / weights:.3f} bits per weight of "
        f"{grouped(weights)}",
        "The file holds as much and its header, or less with lossless coding, which "
        "depends on values. Nothing was written.",
    )
    row = {
        "model": str(options.model),
        "recipe": recipe,
        "weights": weights,
        "memory_bytes_before": before,
        "memory_bytes_after": later,
        "dry_run": True,
    }
    if options.json:
        reporting.append_lines(options.json, [row])


def _abstract(
    params: Params,
    stage: Any,
    layouts: Mapping[str, Layout] | None,
    rated: dict[str, int],
    calibrated: bool,
) -> Params:
    """Return shapes of what a stage makes. Leaves that take a rate stay, their bytes
    are added to `rated`.
    """
    rules: list[tuple[str, Any]] = []
    bound = bind(params, stage, None, layouts)
    for entry in bound.selected:
        f = bound.methods[entry.name]
        _, options_of = unwrap(f)
        if "rate" in options_of:
            rated[entry.name] = int(np.mean(options_of["rate"]) * entry.value.size / 8)
            continue
        kind = traits(f)
        if not kind.traceable and kind.selects == "weights":
            raise ValueError(
                f"the size that {describe(f)} gives depends on values, which --dry-run "
                "does not read; leave it out"
            )
        if calibrated and kind.without_data is not None:
            f = kind.without_data  # of the same width
        rules.append((re.escape(entry.name), f))
    if not rules:
        return params
    run = functools.partial(compress, recipe=rules, layouts=layouts)
    return jax.eval_shape(run, params)
