"""64 bits that stand for a view, equal in every process."""

START = 0xCBF29CE484222325
MASK = (1 << 64) - 1


def mix(digest: int, *words: int) -> int:
    """Fold integers into a digest, in order."""
    for word in words:
        digest = ((digest ^ (word & MASK)) * 0x100000001B3 + 0x9E3779B97F4A7C15) & MASK
    return digest
