"""Fewer weights per kernel: products of thin matrices, cores and factors."""

from jaxcompress.factorization.corrections import corrected
from jaxcompress.factorization.cp import CP, cp
from jaxcompress.factorization.low_rank import LowRank
from jaxcompress.factorization.svd import energies, svd
from jaxcompress.factorization.tucker import Tucker, tucker

__all__ = [
    "CP",
    "LowRank",
    "Tucker",
    "corrected",
    "cp",
    "energies",
    "svd",
    "tucker",
]
