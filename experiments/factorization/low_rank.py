"""What do thin factors cost a model, plain, weighted, and with planned ranks?

Factorizes the kernels of all layers (not the embedding, which is also the head) to 90,
80 and 60 % of their weights: by the SVD of the weights, by the activation-weighted SVD,
by that with the ranks that `plan_ranks` gives each layer, and by both with curvatures
("curved"); then a coarse grid with
and without a thin correction, and a chain of pruning, factors, codes and entropy
coding, saved and loaded. Perplexity and KL are of text not used for calibration. For
weighted rows, `identity_gap` is the largest relative difference, over all layers,
between the expected squared change of the output and the discarded singular values.
One JSON line per row, appended as it is done; rows that the results hold already are
not run again:

    python -m experiments.factorization.low_rank
    python -m experiments.factorization.low_rank SmolLM2.gguf text.txt
"""

import ast
import dataclasses
import functools
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import OnText, parse
from experiments.common.models import quality
from experiments.common.results import Results
from experiments.pruning.pruned import KERNELS, curved, inputs_of, kernels
from jaxcompress import reporting
from jaxcompress.evaluation import Apply
from jaxcompress.factorization import energies
from jaxcompress.tree.equality import same_bits
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.paths import roots

FRACTIONS = (0.9, 0.8, 0.6)
WAYS = ("plain", "weighted", "planned", "curved")
DAMPING = 1e-3  # the default of svd
BASE = "symmetric(bits=3, block=64, full_range=True)"
CORRECTIONS = (
    BASE,
    f"corrected(base={BASE!r}, rank=32, weighted=False)",
    f"corrected(base={BASE!r}, rank=32)",
)
THIN, PRUNED = r"layer_\d+/attention/.*kernel", r"layer_\d+/mlp/.*kernel"
CHAIN = (
    [(PRUNED, "wanda(sparsity=0.3)")],
    [(THIN, "svd(fraction=0.9)")],
    [
        (".*embedding", "symmetric(bits=8)"),
        (".*(left|right)", "symmetric(bits=8, block=64)"),
        (".*values", "symmetric(bits=6, block=64)"),
    ],
    "entropy_code()",
    "code_floats()",
)


@dataclasses.dataclass(frozen=True)
class Config(OnText):
    results: str = "experiments/factorization/results/low_rank.jsonl"


def names(config: Config) -> list[str]:
    """List the rows of the table, in order."""
    found = [f"{way} {fraction}" for fraction in FRACTIONS for way in WAYS]
    found += [*CORRECTIONS, "chain"]
    if config.fast:
        found = ["weighted 0.8", "planned 0.8"]
    return [name for name in found if config.only in name]


def truncated(full: Any, ranks: dict[str, int | None], params: Any) -> Any:
    """Truncate full decompositions to ranks; the dense kernel where it is None."""

    def cut_off(path: Any, leaf: Any, dense: Any) -> Any:
        name = "/".join(str(key.key) for key in path)
        if name not in ranks:
            return leaf
        rank = ranks[name]
        if rank is None:
            return dense
        return jc.LowRank(leaf.left[:, :rank], leaf.right[:rank])

    return jax.tree_util.tree_map_with_path(cut_off, full, params, is_leaf=is_leaf)


def keep(params: Any, fraction: float) -> dict[str, int]:
    """Choose the rank of each kernel that keeps this fraction of its weights."""
    found = {}
    for name, x in kernels(params):
        share = fraction * x.shape[0] * x.shape[1] / sum(x.shape)
        found[name] = max(1, int(share + 1e-9))
    return found


def planned(rules: list[Any]) -> dict[str, int | None]:
    """Read the ranks in a recipe of `plan_ranks`."""
    found: dict[str, int | None] = {}
    for pattern, method in rules:
        number = method and re.search(r"rank=(\d+)", method)[1]
        found[re.sub(r"\\(.)", r"\1", pattern)] = number and ast.literal_eval(number)
    return found


def identity_gap(params: Any, small: Any, moments: Any) -> tuple[float, float]:
    """Sum the weighted loss; find how far a layer's is from its discarded values."""
    worst, total = 0.0, 0.0
    factors = dict(roots(small))
    for name, x in kernels(params):
        leaf = factors[name]
        if not isinstance(leaf, jc.LowRank):
            continue
        second = np.asarray(moments[name].second, np.float64)
        diagonal = np.diagonal(second)
        extra = np.where(diagonal > 0, DAMPING, 1.0) * diagonal.mean()
        left, right = (np.asarray(f, np.float64) for f in (leaf.left, leaf.right))
        change = left @ right - np.asarray(x, np.float64)
        loss = np.sum(change * (second @ change + extra[:, None] * change))
        gains = np.asarray(energies(x, moments[name], damping=DAMPING), np.float64)
        lost = gains[leaf.rank :].sum()
        worst, total = max(worst, abs(loss - lost) / lost), total + loss
    return total, worst


class Rows:
    """The compressed parameters of each row; decompositions are made once."""

    def __init__(self, params: Any, moments: Any, curved: Any) -> None:
        self.params, self.moments, self.curved = params, moments, curved
        self.full: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name == "chain":
            return jc.compress(self.params, jc.chain(*CHAIN), self.moments)
        if name in CORRECTIONS:
            return jc.compress(self.params, [(KERNELS, name)], self.moments)
        way, fraction = name.split()
        moments = self.curved() if way == "curved" else self.moments
        kind = "weighted" if way == "planned" else way
        if kind not in self.full:
            recipe = [(KERNELS, f"svd(fraction=1.0, weighted={way != 'plain'})")]
            self.full[kind] = jc.compress(self.params, recipe, moments)
        ranks: dict[str, Any] = keep(self.params, float(fraction))
        if way in ("planned", "curved"):
            kinds = {"where": KERNELS, "moments": moments}
            plan = jc.planning.plan_ranks(
                self.params, fraction=float(fraction), **kinds
            )
            ranks = planned(plan)
        return truncated(self.full[kind], ranks, self.params)


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows that the results lack, in order."""
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", text="", calibration=4, windows=4, tokens=128
        )
    title, results = Path(config.model).name, Results(config)
    todo = [x for x in names(config) if not results.holds(model=title, row=x)]
    if not todo:
        return []
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    inputs, batches = inputs_of(tokenizer, config)
    moments = jc.collect_moments(model, params, inputs, where=KERNELS)
    scanned, dense = model.clone(scan=True), jc.models.stack_layers(params)

    @functools.cache
    def with_curvatures() -> Any:
        return curved(model, params, inputs, moments, KERNELS)

    make = Rows(params, moments, with_curvatures)
    weights = sum(x.size for _, x in kernels(params))
    for name in todo:
        clock = time.process_time()
        small = jax.block_until_ready(make(name))
        seconds = time.process_time() - clock
        row: dict[str, Any] = {"model": title, "row": name}
        if name == "chain":
            row |= stored(model, params, small, tokenizer)
        elif name not in CORRECTIONS:
            found = dict(roots(small))
            kept = sum(jc.nbytes(found[k]) // 4 for k, _ in kernels(params))
            row["kept_weights"] = kept / weights
        if name.startswith(("weighted", "planned")):
            row["layer_loss"], row["identity_gap"] = identity_gap(
                params, small, moments
            )
        ready = jc.models.stack_layers(jax.jit(jc.materialize)(small))
        report = jc.compare(Apply(scanned), dense, ready, batches)
        row |= {
            **quality(report),
            "processor_seconds": seconds,
            "calibration_tokens": inputs.size,
        }
        results.add(row)
    return results.rows


def stored(model: Any, params: Any, small: Any, tokenizer: Any) -> dict[str, Any]:
    """Measure the file of a compressed model, once it came back bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        jc.models.save(path, model, small, tokenizer)
        loaded = jc.models.load(path)[1]
        if not same_bits(small, loaded):
            raise ValueError("the file did not come back bit for bit")
        size = reporting.measure(loaded, path)
    tokens = jnp.ones((1, 8), jnp.int32)
    run_it = jax.jit(lambda p: model.apply({"params": p}, tokens))
    wanted, found = run_it(jax.jit(jc.materialize)(small)), run_it(loaded)
    return {
        "recipe": [str(stage) for stage in CHAIN],
        "file_bytes": size.file_bytes,
        "dense_bytes": jc.nbytes(params),
        "bits_per_weight": size.bits_per_weight,
        "largest_logit_difference": float(jnp.abs(wanted - found).max()),
    }


if __name__ == "__main__":
    run(parse(Config, __doc__))
