"""Teaching a small model what a large one knows, and training what was compressed."""

from jaxcompress.distillation.alignment import (
    attention_maps,
    hidden_states,
    initial_projection,
    layer_pairs,
    over_layers,
    relations,
)
from jaxcompress.distillation.cached import (
    Sampled,
    TopK,
    cached_kl,
    read_cache,
    sampled,
    sampled_kl,
    top_k,
    top_k_kl,
    write_cache,
)
from jaxcompress.distillation.features import capture, feature_names
from jaxcompress.distillation.losses import (
    count,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    loss,
    mean,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    soft_cross_entropy,
)
from jaxcompress.distillation.objectives import (
    cached_labels,
    hard_labels,
    soft_labels,
)
from jaxcompress.distillation.rollouts import on_policy, rollout
from jaxcompress.training.runs import (
    latest_checkpoint,
    restore_state,
    save_state,
    train,
)
from jaxcompress.training.steps import (
    TrainState,
    cast_like,
    init_state,
    make_train_step,
    place,
    shard_batch,
)

__all__ = [
    "Sampled",
    "TopK",
    "TrainState",
    "attention_maps",
    "cached_kl",
    "cached_labels",
    "capture",
    "cast_like",
    "count",
    "cross_entropy",
    "feature_names",
    "forward_kl",
    "hard_labels",
    "hidden_states",
    "init_state",
    "initial_projection",
    "jensen_shannon",
    "latest_checkpoint",
    "layer_pairs",
    "loss",
    "make_train_step",
    "mean",
    "on_policy",
    "over_layers",
    "place",
    "read_cache",
    "relations",
    "restore_state",
    "reverse_kl",
    "rollout",
    "sampled",
    "sampled_kl",
    "save_state",
    "shard_batch",
    "skewed_kl",
    "skewed_reverse_kl",
    "soft_cross_entropy",
    "soft_labels",
    "top_k",
    "top_k_kl",
    "train",
    "write_cache",
]
