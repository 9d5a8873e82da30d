"""Flax reference models, and how to load, run and write them."""

from jaxcompress.models.bert import Bert, sentence_embeddings
from jaxcompress.models.convolutional import ConvNet
from jaxcompress.models.generation import generate
from jaxcompress.models.loading import load, open_weights
from jaxcompress.models.saved import save
from jaxcompress.models.stacking import stack_layers, unstack_layers
from jaxcompress.models.structure import (
    filter_groups,
    head_groups,
    layer_groups,
    layer_influence,
    neuron_groups,
    resized,
)
from jaxcompress.models.students import (
    channel_group,
    fewer_channels,
    fewer_layers,
    fewer_neurons,
)
from jaxcompress.models.transformer import Transformer
from jaxcompress.models.vocabulary import trim_vocabulary

__all__ = [
    "Bert",
    "ConvNet",
    "Transformer",
    "channel_group",
    "fewer_channels",
    "fewer_layers",
    "fewer_neurons",
    "filter_groups",
    "generate",
    "head_groups",
    "layer_groups",
    "layer_influence",
    "load",
    "neuron_groups",
    "open_weights",
    "resized",
    "save",
    "sentence_embeddings",
    "stack_layers",
    "trim_vocabulary",
    "unstack_layers",
]
