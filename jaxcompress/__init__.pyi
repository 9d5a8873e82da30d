"""Public names for type checkers and editors; `__init__.py` imports them lazily."""

from jaxcompress import distillation as distillation
from jaxcompress import evaluation as evaluation
from jaxcompress import export as export
from jaxcompress import models as models
from jaxcompress import planning as planning
from jaxcompress import plots as plots
from jaxcompress import storage as storage
from jaxcompress import textcoding as textcoding
from jaxcompress import tokenization as tokenization
from jaxcompress import training as training
from jaxcompress import tree as tree
from jaxcompress.calibration.block_curvatures import (
    measure_curvatures_blockwise as measure_curvatures_blockwise,
)
from jaxcompress.calibration.blockwise import compress_blockwise as compress_blockwise
from jaxcompress.calibration.collect import collect_moments as collect_moments
from jaxcompress.calibration.curvatures import measure_curvatures as measure_curvatures
from jaxcompress.calibration.moments import Moments as Moments
from jaxcompress.calibration.moments import (
    moments_from_covariance as moments_from_covariance,
)
from jaxcompress.calibration.sensitivities import (
    measure_sensitivities as measure_sensitivities,
)
from jaxcompress.coding.floats.code_floats import CodedFloats as CodedFloats
from jaxcompress.coding.floats.code_floats import code_floats as code_floats
from jaxcompress.coding.floats.leaf import CodedWords as CodedWords
from jaxcompress.coding.integers.leaf import Coded as Coded
from jaxcompress.coding.integers.leaf import entropy_code as entropy_code
from jaxcompress.coding.levels.leaf import CodedLevels as CodedLevels
from jaxcompress.coding.levels.rate_coded import RateCoded as RateCoded
from jaxcompress.coding.packing import Packed as Packed
from jaxcompress.coding.packing import pack_bits as pack_bits
from jaxcompress.evaluation import compare as compare
from jaxcompress.evaluation import evaluate as evaluate
from jaxcompress.evaluation.sweep import sweep as sweep
from jaxcompress.factorization.corrections import corrected as corrected
from jaxcompress.factorization.cp import CP as CP
from jaxcompress.factorization.cp import cp as cp
from jaxcompress.factorization.low_rank import LowRank as LowRank
from jaxcompress.factorization.svd import svd as svd
from jaxcompress.factorization.tucker import Tucker as Tucker
from jaxcompress.factorization.tucker import tucker as tucker
from jaxcompress.pruning import masks as masks
from jaxcompress.pruning import structured as structured
from jaxcompress.pruning.outliers import outliers as outliers
from jaxcompress.pruning.reconstruction import alps as alps
from jaxcompress.pruning.reconstruction import sparsegpt as sparsegpt
from jaxcompress.pruning.scores import magnitude as magnitude
from jaxcompress.pruning.scores import wanda as wanda
from jaxcompress.pruning.sparse import Sparse as Sparse
from jaxcompress.quantization.awq import Scaled as Scaled
from jaxcompress.quantization.awq import awq as awq
from jaxcompress.quantization.gptq import gptq as gptq
from jaxcompress.quantization.grids import Quantized as Quantized
from jaxcompress.quantization.hqq import hqq as hqq
from jaxcompress.quantization.learned import learned as learned
from jaxcompress.quantization.mixed import mixed_channels as mixed_channels
from jaxcompress.quantization.nearest import asymmetric as asymmetric
from jaxcompress.quantization.nearest import sign_split as sign_split
from jaxcompress.quantization.nearest import symmetric as symmetric
from jaxcompress.quantization.number_formats import fp8 as fp8
from jaxcompress.quantization.number_formats import mxfp4 as mxfp4
from jaxcompress.quantization.number_formats import nf4 as nf4
from jaxcompress.quantization.number_formats import nvfp4 as nvfp4
from jaxcompress.quantization.rate_distortion import rate_distortion as rate_distortion
from jaxcompress.reporting.leaves import explain as explain
from jaxcompress.reporting.leaves import report as report
from jaxcompress.reporting.versions import show_versions as show_versions
from jaxcompress.running.check import check as check
from jaxcompress.running.compressed_matmul import compressed_matmul as compressed_matmul
from jaxcompress.running.low_memory import low_memory as low_memory
from jaxcompress.running.shardings import shardings as shardings
from jaxcompress.shrinking.shrink import shrink as shrink
from jaxcompress.shrinking.shrunk import Shrunk as Shrunk
from jaxcompress.storage.checkpoint import load as load
from jaxcompress.storage.checkpoint import open_checkpoint as open_checkpoint
from jaxcompress.storage.checkpoint import save as save
from jaxcompress.storage.checkpoint import verify as verify
from jaxcompress.storage.orbax import restore_orbax as restore_orbax
from jaxcompress.storage.orbax import save_orbax as save_orbax
from jaxcompress.storage.tree_json import FileDamaged as FileDamaged
from jaxcompress.tracing.layouts import find_layouts as find_layouts
from jaxcompress.training import optimizers as optimizers
from jaxcompress.training import qat as qat
from jaxcompress.training.qat_leaf import FakeQuantized as FakeQuantized
from jaxcompress.training.steps import make_train_step as make_train_step
from jaxcompress.tree.compress import chain as chain
from jaxcompress.tree.compress import compress as compress
from jaxcompress.tree.generic_leaves import Mixed as Mixed
from jaxcompress.tree.generic_leaves import Reshaped as Reshaped
from jaxcompress.tree.generic_leaves import Sum as Sum
from jaxcompress.tree.layouts import Layout as Layout
from jaxcompress.tree.leaf import Leaf as Leaf
from jaxcompress.tree.leaf import leaf as leaf
from jaxcompress.tree.leaf import materialize as materialize
from jaxcompress.tree.leaf import nbytes as nbytes
from jaxcompress.tree.leaf import static as static
from jaxcompress.tree.methods import method as method
from jaxcompress.tree.partitions import combine as combine
from jaxcompress.tree.partitions import partition as partition
from jaxcompress.tree.paths import leaf_names as leaf_names
from jaxcompress.tree.record import LeafReport as LeafReport

__version__: str
__all__: list[str]
