"""A model as a StableHLO program: run by JAX alone, without Flax or this package."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from jaxcompress.export.sharded_files import DTYPES, new_file, write_tensors
from jaxcompress.tracing.modules import model_function
from jaxcompress.tree.paths import key_name
from jaxcompress.types import Model, Params

PROGRAM = "program"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled model: `exported` takes a list of arrays, then the batch.

    `names` and `arrays` are the compressed weights as they are stored, in the order in
    which the program takes them; both are empty where they are constants of it.

    Example:
      >>> program = jc.export.stablehlo(apply_fn, small, tokens)
      >>> program.save("model.safetensors")
    """

    exported: export.Exported
    names: tuple[str, ...]
    arrays: tuple[Any, ...]

    def __call__(self, batch: Any) -> Any:
        return self.exported.call(list(self.arrays), batch)

    def save(self, path: str | Path) -> None:
        """Write the program and its weights to one `.safetensors` file.

        The tensor `program` is the serialized program, the others are its arrays in
        the order of their names. A process with JAX, NumPy and safetensors runs it:

            tensors = safetensors.numpy.load_file("model.safetensors")
            program = jax.export.deserialize(tensors.pop("program").tobytes())
            arrays = [tensors[name] for name in sorted(tensors)]
            logits = program.call(arrays, batch)

        Raises:
          FileExistsError: the file exists.
          ModuleNotFoundError: the package `flatbuffers` is not installed.
          ValueError: an array of a dtype that safetensors lacks; names it.
        """
        tensors = {PROGRAM: _serialized(self.exported)}
        for i, (name, x) in enumerate(zip(self.names, self.arrays, strict=True)):
            array = np.asarray(x)
            if array.dtype.name not in DTYPES:
                raise ValueError(
                    f"{name} has dtype {array.dtype}, which .safetensors files lack; "
                    "export with embedded=True"
                )
            tensors[f"{i:06d}/{name}"] = array
        with new_file(path) as partial:
            write_tensors(partial, tensors)


def _serialized(exported: export.Exported) -> np.ndarray:
    """Return the bytes of a program, as uint8."""
    try:
        return np.frombuffer(exported.serialize(), np.uint8)
    except ImportError as error:
        raise ModuleNotFoundError(
            "jax.export needs the package flatbuffers to write programs, and to read "
            "them: pip install 'jaxcompress[stablehlo]'"
        ) from error


def stablehlo(
    model: Model,
    params: Params,
    batch: Any,
    *,
    platforms: str | Sequence[str] = ("cpu",),
    embedded: bool = False,
) -> Program:
    """Export a model and its compressed weights as one StableHLO program.

    The weights stay compressed: the program dequantizes them where it multiplies.

    Args:
      model: a Linen or NNX module, or a function of `(params, batch)`.
      params: pytree of arrays and leaves.
      batch: an example, or `jax.ShapeDtypeStruct` in its place; a size from
        `jax.export.symbolic_shape` stays free.
      platforms: any of "cpu", "cuda", "rocm", "tpu"; the program runs on all of them.
      embedded: the weights are constants of the program, not arguments.

    Raises:
      ValueError: no platform, or one that JAX does not know.

    Source: `jax.export`; its documentation says for which versions of JAX a program
    keeps its meaning.

    Example:
      >>> platforms = ["cpu", "tpu"]
      >>> program = jc.export.stablehlo(apply_fn, small, tokens, platforms=platforms)
      >>> [x.shape for x in program.exported.out_avals]
      [(2, 16, 263)]
    """
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    supported = ("cpu", "cuda", "rocm", "tpu")
    if not platforms or set(platforms) - set(supported):
        raise ValueError(
            f"platforms must be some of {', '.join(supported)}, not {list(platforms)}"
        )
    function = model_function(model)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = tuple("/".join(key_name(key) for key in path) for path, _ in flat)
    arrays = [x for _, x in flat]

    def run(arrays: list[Any], batch: Any) -> Any:
        return function(jax.tree.unflatten(treedef, arrays), batch)

    if embedded:
        constants, arrays, names = arrays, [], ()

        def program(arrays: list[Any], batch: Any) -> Any:
            del arrays
            return run(constants, batch)

    else:
        program = run
    exported = export.export(jax.jit(program), platforms=platforms)(arrays, batch)
    return Program(exported, names, tuple(arrays))
