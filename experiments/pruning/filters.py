"""What do a convolutional network's filters and kernels hold that it does not need?

Trains a small network with batch norm on scikit-learn's digits (the extra `images`).
Then, each from the trained network: removes filters by their activation, with nothing
made up for, with the readers refitted in closed form, with the statistics of the norms
measured again, and after one epoch of training as well; and factorizes its kernels by
Tucker-2 (channels in and out) and CP, before and after the norms are measured again.
One JSON line per row:

    python -m experiments.pruning.filters
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress.models import ConvNet, filter_groups, resized

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Config:
    filters: int = 32  # of the first two convolutions; twice as many in the others
    epochs: int = 20
    tuned_epochs: int = 1
    seed: int = 0
    fast: bool = False  # fewer filters, two epochs
    results: str = "experiments/pruning/results/filters.jsonl"


def digits(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Load images [B, 8, 8, 1] from 0 to 1 and labels [B]: 1 297 and 500."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    images = found.images[order, :, :, None].astype(np.float32) / 16
    labels = found.target[order].astype(np.int32)
    return (images[500:], labels[500:]), (images[:500], labels[:500])


def train(
    model: ConvNet, variables: Any, data: Any, epochs: int, rate: float, seed: int
) -> Any:
    """Train for some epochs of Adam, whose rate falls to zero."""
    images, labels = data
    steps = len(images) // BATCH
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    def loss(params: Any, statistics: Any, x: jax.Array, y: jax.Array) -> Any:
        logits, changed = model.apply(
            {"params": params, "batch_stats": statistics},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), changed["batch_stats"]

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        slopes, statistics = jax.grad(loss, has_aux=True)(
            variables["params"], variables["batch_stats"], x, y
        )
        updates, state = optimizer.update(slopes, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": statistics}, state

    state = optimizer.init(variables["params"])
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for batch in order[: steps * BATCH].reshape(steps, BATCH):
            variables, state = step(variables, state, images[batch], labels[batch])
    return variables


def measured_norms(model: ConvNet, variables: Any, images: np.ndarray) -> Any:
    """Measure batch statistics anew on these images; weights as they are."""
    same = model.clone(momentum=0.0)  # what is measured replaces what was
    _, changed = jax.jit(
        lambda variables, images: same.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
    )(variables, images)
    return {**variables, **changed}


def accuracy(model: ConvNet, variables: Any, data: Any) -> float:
    logits = jax.jit(model.apply)(variables, data[0])
    return float(np.mean(np.argmax(logits, axis=-1) == data[1]))


def milliseconds(model: ConvNet, variables: Any, images: np.ndarray) -> float:
    """Time one forward pass: the least of several, of the processor."""
    run, dense = jax.jit(model.apply), jax.jit(jc.materialize)(variables)
    run(dense, images).block_until_ready()
    times = []
    for _ in range(15):
        clock = time.process_time()
        run(dense, images).block_until_ready()
        times.append(time.process_time() - clock)
    return 1000 * min(times)


def run(config: Config) -> list[dict[str, Any]]:
    """Train a network, remove filters and factorize; a row for each, trained first."""
    if config.fast:
        config = dataclasses.replace(config, filters=8, epochs=2)
    data, test = digits(config.seed)
    width = config.filters
    model = ConvNet(filters=(width, width, 2 * width, 2 * width))
    variables = jax.jit(model.init)(jax.random.key(config.seed), data[0][:1])
    variables = train(model, variables, data, config.epochs, 3e-3, config.seed)
    results = Results(config, config=dataclasses.asdict(config))

    def row(method: str, model: ConvNet, variables: Any, **more: Any) -> None:
        results.add(
            {
                "method": method,
                "accuracy": accuracy(model, variables, test),
                "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
                "bytes": jc.nbytes(variables["params"]),
                "filters": model.filters,
                "processor_ms": milliseconds(model, variables, test[0]),
                **more,
            }
        )

    row("trained", model, variables)
    function = lambda variables, images: model.apply(variables, images)  # noqa: E731
    batches = list(jnp.asarray(data[0][: 18 * BATCH]).reshape(-1, BATCH, 8, 8, 1))
    select = r"params/(conv_[1-9]|head)/kernel"
    moments = jc.collect_moments(function, variables, batches, where=select)
    layout = jc.find_layouts(function, variables, batches[0])
    groups = filter_groups(model)
    scores = jc.structured.score_units(
        moments, groups, params=variables, layouts=layout, by="activation"
    )
    for fraction in (0.5,) if config.fast else (0.25, 0.5, 0.75):
        keep = jc.structured.choose_units(scores, fraction)
        for made_up in (None, moments):
            small = jc.structured.remove_units(
                variables, groups, keep, made_up, layouts=layout
            )
            less = resized(model, small)
            name = "filters by activation"
            row(name, less, small, removed=fraction, made_up=made_up is not None)
        again = measured_norms(less, small, data[0])
        row(f"{name}, norms again", less, again, removed=fraction, made_up=True)
        tuned = train(less, small, data, config.tuned_epochs, 1e-3, config.seed + 1)
        row(
            f"{name}, then {config.tuned_epochs} epoch",
            less,
            tuned,
            removed=fraction,
            made_up=True,
        )
    for share in (0.5,) if config.fast else (0.75, 0.5, 0.25):
        tucker, cp = [], []
        for i in range(1, len(model.filters)):
            sizes = (3, 3, model.filters[i - 1], model.filters[i])
            ranks = (None, None, *(max(1, round(share * size)) for size in sizes[2:]))
            # As many numbers as Tucker-2 keeps, at most what CP can use.
            numbers = 9 * ranks[2] * ranks[3] + sum(
                a * b for a, b in zip(sizes[2:], ranks[2:], strict=True)
            )
            rank = min(round(numbers / sum(sizes)), 9 * min(sizes[2:]))
            name = f"params/conv_{i}/kernel"
            tucker.append((name, f"tucker(ranks={ranks}, sizes={sizes})"))
            cp.append((name, f"cp(rank={rank}, sizes={sizes}, sweeps=50)"))
        for name, rules in (("tucker-2", tucker), ("cp", cp)):
            small = jc.compress(variables, rules, layouts=layout)
            row(name, model, small, share_of_channels=share, recipe=rules)
            again = measured_norms(model, small, data[0])
            row(f"{name}, norms again", model, again, share_of_channels=share)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))
