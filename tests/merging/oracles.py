"""The merge formulas written once more, in NumPy float64, and random models to merge."""

import hashlib

import numpy as np


def average(experts, weights=None):
    return np.average(np.float64(experts), axis=0, weights=weights)


def task_arithmetic(base, experts, scale, weights=None):
    taus = np.float64(experts) - np.float64(base)
    return base + scale * np.einsum(
        "n...,n->...", taus, np.ones(len(taus)) if weights is None else weights
    )


def trim(tau, density):
    """Top share of |tau| over everything that is passed, ties at the threshold included."""
    keep = int(tau.size * density)
    if keep == tau.size:
        return tau
    if keep == 0:
        return np.zeros_like(tau)
    threshold = np.sort(np.abs(tau), axis=None)[tau.size - keep]
    return np.where(np.abs(tau) >= threshold, tau, 0)


def disjoint_mean(taus):
    elected = np.sign(taus.sum(0))
    agreeing = (np.sign(taus) == elected) & (taus != 0)
    return np.where(agreeing, taus, 0).sum(0) / np.maximum(agreeing.sum(0), 1)


def exact_task_vectors(base, experts):
    """In float32, as the rule is: each difference is rounded once."""
    return np.float64(np.float32(experts) - np.float32(base))


def ties(base, experts, density, scale):
    taus = np.stack([trim(tau, density) for tau in exact_task_vectors(base, experts)])
    return base + scale * disjoint_mean(taus)


def dare_ties(base, experts, kept, drop_rate, density, scale):
    taus = exact_task_vectors(base, experts)
    dropped = np.where(kept, taus / (1 - drop_rate), 0)
    taus = np.stack([trim(tau, density) for tau in dropped])
    return base + scale * disjoint_mean(taus)


def drop_rates_by_rank(tau, drop_rate, epsilon):
    """From p + epsilon for the smallest to p - epsilon; alike to 8 bits of magnitude is equal."""
    bins = np.abs(np.float32(tau)).view(np.uint32) >> 16
    below = (bins[:, None] > bins[None, :]).sum(1)
    equal = (bins[:, None] == bins[None, :]).sum(1)
    ranks = (below + (equal - 1) / 2) / max(1, tau.size - 1)
    return drop_rate + epsilon - 2 * epsilon * ranks


_WORD = 0xFFFFFFFF


def threefry2x32(key, counter):
    """Threefry-2x32-20 on Python integers, from the paper."""
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    schedule = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = [(word + subkey) & _WORD for word, subkey in zip(counter, schedule, strict=False)]
    for number in range(20):
        x = (x + y) & _WORD
        rotation = rotations[number % 8]
        y = (((y << rotation) | (y >> (32 - rotation))) & _WORD) ^ x
        if number % 4 == 3:
            group = number // 4 + 1
            x = (x + schedule[group % 3]) & _WORD
            y = (y + schedule[(group + 1) % 3] + group) & _WORD
    return x, y


def kept(seed, experts, parameter, size, drop_rate, start=0):
    """Booleans [experts, size]: the documented draw, one element at a time.

    `drop_rate` is a number, or an array [experts, size].
    """
    rates = np.broadcast_to(np.float64(drop_rate), (experts, size))
    masks = np.zeros((experts, size), bool)
    for expert in range(experts):
        text = f"m2l dare/{seed}/{expert // 2}/{parameter}"
        digest = hashlib.sha256(text.encode()).digest()
        key = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
        for element in range(size):
            index = start + element
            words = threefry2x32(key, (index >> 32, index & _WORD))
            masks[expert, element] = words[expert % 2] >= int(rates[expert, element] * 2**32)
    return masks
