import numpy as np

def versions() -> list[str]:
    """Those that this processor runs, the fastest first."""

def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
    place: int,
    starts: np.ndarray | None,
    window: int,
    cos: np.ndarray | None,
    sin: np.ndarray | None,
    eps: float,
    scale: float,
    threads: int,
    version: str = "",
) -> None:
    """Store the keys and values of one new token a row, and attend to those so far.

    bfloat16 stands as int16 or uint16 with its bits.

    Args:
        q: (B, H * D) of float32 or bfloat16, rows contiguous.
        k: (B, K * D).
        v: (B, K * D).
        keys: (B, K, S, D), written to at ``place``. D is a multiple of 16 up to 512.
        values: (B, K, S, D), the same.
        out: (B, H * D), is written to.
        place: of the new token, which attends to no later one.
        starts: int64 (B), the first place of each row; None: 0.
        window: attends to so many places at most, the new one included; 0: to all.
        cos: float32 (S, D / 2), by the distance from the row's start; None: no rotation.
        sin: the same.
        eps: of the RMS norm of query and key heads before the rotation; negative: no norm.
        scale: of the scores.
        threads: at most; fewer if there is little to read. 0: one per core.
        version: one of `versions`; empty: the fastest.

    Raises:
        ValueError: shapes, types or places that do not fit.
    """
