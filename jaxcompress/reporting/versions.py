"""`show_versions`: what a bug report needs to say."""

import importlib.metadata
import platform

import jax

from jaxcompress import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "chex")


def show_versions() -> None:
    """Print the versions and devices that a bug report should name.

    jc.show_versions()

    Example:
      >>> jc.show_versions()
      jaxcompress ...
    """
    rows = [("jaxcompress", __version__), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    rows.append(("devices", f"{jax.device_count()} ({devices})"))
    rows.append(("system", platform.platform()))
    for name, value in rows:
        print(f"{name:18}{value}")
