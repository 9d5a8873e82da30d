"""What does a sparse model cost on disk and in time, beside quantized and dense ones?

On the reference model. "disk": files, coded without loss, of quantized kernels, of
sparse kernels, and of sparse kernels whose values are quantized, with their KL on text
not used for calibration; the embedding has 8 bits in all of them. "time": processor
time of a forward pass, in turns, of the dense model, of half the weights as `Sparse`
leaves without a pattern, N:M and in blocks, and of half the neurons and heads removed.
One JSON line per row, appended as it is done; rows that the results hold already are
not run again:

    python -m experiments.pruning.sparse_cost
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import quality
from experiments.common.results import Results
from experiments.pruning import pruned, structured
from jaxcompress import models, reporting
from jaxcompress.evaluation import Apply
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tree.equality import same_bits

KERNELS = pruned.KERNELS
VALUES = f"{KERNELS}/values"
EMBEDDING = (".*embedding", "symmetric(bits=8)")
CODED = ("entropy_code()", "code_floats()")
DISK = (
    [[(KERNELS, "symmetric(bits=8)")]],
    [[(KERNELS, "gptq(bits=4, block=64)")]],
    [[(KERNELS, "gptq(bits=3, block=64)")]],
    [[(KERNELS, "gptq(bits=2, block=64)")]],
    [[(KERNELS, "alps(sparsity=0.5)")]],
    [[(KERNELS, "alps(sparsity=0.5)")], [(VALUES, "symmetric(bits=8, block=64)")]],
    [[(KERNELS, "alps(sparsity=0.5)")], [(VALUES, "symmetric(bits=4, block=64)")]],
    [[(KERNELS, "alps(nm='2:4')")], [(VALUES, "symmetric(bits=4, block=64)")]],
    [[(KERNELS, "alps(sparsity=0.7)")], [(VALUES, "symmetric(bits=4, block=64)")]],
)
PATTERNS = {
    "unstructured": "magnitude(sparsity=0.5)",
    "2:4": "magnitude(nm='2:4')",
    "blocks of 16x16": "magnitude(sparsity=0.5, nm='16x16')",
}


@dataclasses.dataclass(frozen=True)
class Config(pruned.Config):
    results: str = "experiments/pruning/results/sparse_cost.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows of both tables that the results lack."""
    disk = DISK
    if config.fast:
        config = dataclasses.replace(config, calibration=4, windows=4, tokens=64)
        disk = DISK[7:8]
    results = Results(config)
    model, params, tokenizer = models.load("reference", scan=False)
    inputs, batches = pruned.inputs_of(tokenizer, config)
    scanned, dense = model.clone(scan=True), models.stack_layers(params)
    moments = None
    for stages in disk if config.only in "disk" else ():
        recipe = [[list(rule) for rule in stage] for stage in stages]
        if results.holds(recipe=recipe):
            continue
        if moments is None:
            moments = jc.collect_moments(model, params, inputs, where=KERNELS)
        first, *others = stages
        small = jc.compress(
            params, jc.chain([EMBEDDING, *first], *others, *CODED), moments
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "small.safetensors"
            models.save(file, model, small, tokenizer)
            loaded = models.load(file)[1]
            if not same_bits(small, loaded):
                raise ValueError(f"{recipe}: the file did not come back bit for bit")
            size = reporting.measure(loaded, file)
        ready = jax.jit(jc.materialize)(models.stack_layers(decode_once(loaded)))
        report = jc.compare(Apply(scanned), dense, ready, batches)
        results.add(
            {
                "table": "disk",
                "recipe": recipe,
                "file_bytes": size.file_bytes,
                "bits_per_weight": size.bits_per_weight,
                **quality(report),
            }
        )
    if config.only in "time" and not results.holds(table="time"):
        names, runs = ["dense"], [(model, params)]
        for name, method in PATTERNS.items():
            names.append(name)
            runs.append((model, jc.compress(params, [(KERNELS, method)])))
        groups = models.neuron_groups(model) | models.head_groups(model)
        sizes = {"mlp": model.mlp_width // 2, "attention": model.kv_heads // 2}
        keep = {label: range(sizes[label.split("/")[1]]) for label in groups}
        less = jc.structured.remove_units(params, groups, keep)
        names.append("structured")
        runs.append((models.resized(model, less), less))
        tokens = batches[0]["tokens"]
        seconds = structured.forward_seconds(runs, tokens, 2 if config.fast else 15)
        for name, (_, small), spent in zip(names, runs, seconds, strict=True):
            results.add(
                {
                    "table": "time",
                    "sparsity": 0.0 if name == "dense" else 0.5,
                    "pattern": name,
                    "forward_processor_seconds": spent,
                    "of_dense": spent / seconds[0],
                    "tokens_in_pass": tokens.size,
                    "memory_bytes": jc.nbytes(small),
                }
            )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__, leave_out=("model", "text", "fraction")))
