"""Strict JAX for every test: two fake devices, no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
