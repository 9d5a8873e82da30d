"""Amounts that each effort spends."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Effort:
    """Meaning of one word.

    Args:
      texts: calibration windows, a fifth of which are held out to measure on.
      length: tokens in a window.
      curvature_rows, curvature_length: sequences that curvatures are measured on; for
        other models than language models the rows are examples.
      states: of the trellis of `rate_distortion`; 0 rounds.
      joint: whether curvatures of pairs of outputs are measured.
      compares: whether the recipe of equal rates is compressed and measured too.
      tuning_steps: training steps on steps of codes and norms.
      tries: files written until the size fits.
    """

    texts: int
    length: int
    curvature_rows: int
    curvature_length: int
    states: int
    joint: bool
    compares: bool
    tuning_steps: int
    tries: int = 6


EFFORTS = {
    "quick": Effort(0, 512, 0, 128, 0, False, False, 0),
    "good": Effort(40, 512, 32, 128, 128, False, True, 0),
    "best": Effort(80, 512, 64, 128, 128, False, True, 128),
}


def choose_effort(effort: str) -> Effort:
    """Return the effort of this name.

    Raises:
      ValueError: an unknown name.
    """
    if effort not in EFFORTS:
        raise ValueError(
            f"shrink takes effort={' or '.join(map(repr, EFFORTS))}, not {effort!r}"
        )
    return EFFORTS[effort]
