"""Files of other programs, told from ours by their first bytes."""

MAGIC = {  # first bytes of files that are mistaken for ours
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, such as a PyTorch checkpoint",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x93NUMPY": "a NumPy array",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
}


def check_ours(path: str, first: bytes) -> None:
    """Name a file whose first nine bytes are those of another program.

    Those of ours are the header's length, any number, and the "{" of the header: a
    length of 640 bytes begins as a pickle does.

    Raises:
      ValueError: such a file; says what reads it.
    """
    if first[8:9] == b"{":
        return
    for magic, program in MAGIC.items():
        if first.startswith(magic):
            raise ValueError(
                f"{path} is {program}, not a file of jaxcompress.save; "
                "`python -m jaxcompress compress` and models.load read models of "
                "other programs (.gguf files, Hugging Face directories)"
            )
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in first[:8]):
        raise ValueError(f"{path} is no .safetensors file; it begins as a text does")
