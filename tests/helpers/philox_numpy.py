"""A second Philox4x32-10: the oracle for every dropout mask, which shares no code with the package.

It computes one counter at a time after Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3", section 3.3 and table 2, in numpy's unsigned integers. It is checked against the known
answers that the authors publish with Random123 (`KNOWN_ANSWERS`, from its file kat_vectors).
"""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1

# (counter, key, output), 10 rounds
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox4x32(counter, key):
    """Returns four 32-bit integers from a counter of four and a key of two."""
    x = [np.uint64(word) for word in counter]
    k = [np.uint32(word) for word in key]
    with np.errstate(over="ignore"):  # 32-bit sums wrap on purpose
        for _ in range(10):
            product0 = x[0] * np.uint64(MULTIPLIERS[0])  # 32 x 32 bits fit into 64
            product1 = x[2] * np.uint64(MULTIPLIERS[1])
            high0, low0 = np.uint32(product0 >> np.uint64(32)), product0.astype(np.uint32)
            high1, low1 = np.uint32(product1 >> np.uint64(32)), product1.astype(np.uint32)
            rounded = (high1 ^ np.uint32(x[1]) ^ k[0], low1, high0 ^ np.uint32(x[3]) ^ k[1], low0)
            x = [np.uint64(word) for word in rounded]
            k = [k[0] + np.uint32(WEYL[0]), k[1] + np.uint32(WEYL[1])]
    return tuple(int(word) for word in x)


def dropout_values(seed, offset, batch, heads, seqlen_q, seqlen_k):
    """Returns the 16-bit value of every element, uint16 [batch, heads, seqlen_q, seqlen_k].

    Element (b, h, row, column) is value column % 8 (low bits first) of the 128 bits that belong to
    the counter (column // 8, row, b * heads + h, offset) and the key (low, high) of a 64-bit seed.
    """
    values = np.zeros((batch, heads, seqlen_q, seqlen_k), np.uint16)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for b, h, row, column in np.ndindex(values.shape):
        if column % 8 == 0:
            counter = (column // 8, row, b * heads + h, offset & 0xFFFFFFFF)
            bits = sum(word << (32 * n) for n, word in enumerate(philox4x32(counter, key)))
        values[b, h, row, column] = (bits >> (16 * (column % 8))) & 0xFFFF
    return values


def keep_mask(seed, offset, dropout_p, batch, heads, seqlen_q, seqlen_k):
    """Returns True where dropout keeps an element: its value is >= round(dropout_p * 65536)."""
    values = dropout_values(seed, offset, batch, heads, seqlen_q, seqlen_k).astype(np.int64)
    return values >= round(dropout_p * 65536)
