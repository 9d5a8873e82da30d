"""The text that ships with the reference model."""

from importlib import resources


def heldout_text() -> str:
    """Return the packaged text that the reference model has not seen in training."""
    data = resources.files("jaxcompress.models") / "data" / "heldout.txt"
    return data.read_bytes().decode("utf-8")
