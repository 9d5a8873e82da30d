"""Text files, read as they are."""

from pathlib import Path


def read_text(path: str | Path) -> str:
    r"""Read a UTF-8 text file without changing a character.

    Line ends stay as they are (`Path.read_text` turns "\r\n" into "\n") and so does a
    byte order mark: the tokens of the result are the tokens of the file.

    ```python
    ids = tokenizer.encode(jc.tokenization.read_text("notes.txt"))
    ```

    Args:
      path: of a file.

    Raises:
      ValueError: the bytes are not UTF-8; names the file and the position.
      OSError: the file can't be read.

    Example:
      >>> _ = open("text.txt", "w").write("a small text")
      >>> texts = jc.tokenization.read_text("text.txt")
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02X} at position "
            f"{error.start}; convert it to UTF-8, or encode its bytes with "
            "tokenization.encode_bytes"
        ) from error
