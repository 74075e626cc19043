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


def tall_masks(base, experts, threshold):
    taus = exact_task_vectors(base, experts)
    # In float32, as the comparison is.
    total = np.float32(0)
    for tau in np.float32(taus):
        total = total + tau
    return taus.sum(0), np.abs(taus) >= np.float32(threshold) * np.abs(total - np.float32(taus))


def tall_mask_models(base, experts, threshold, weights):
    total, masks = tall_masks(base, experts, threshold)
    return base + np.average(masks, axis=0, weights=weights) * total


def consensus_ta(base, experts, threshold, agreement, scale):
    total, masks = tall_masks(base, experts, threshold)
    return base + scale * (masks.sum(0) >= agreement) * total


def ram_plus(base, experts, reinforcement, limit, epsilon):
    taus = exact_task_vectors(base, experts)
    changed = np.abs(taus) > np.float32(epsilon)
    alone = changed & (changed.sum(0) == 1)
    shared = changed & (changed.sum(0) > 1)
    overlap = shared.sum(1) / np.maximum(alone.sum(1), 1)
    factors = 1 + reinforcement * np.minimum(overlap, limit)
    mean = np.where(shared, taus, 0).sum(0) / np.maximum(shared.sum(0), 1)
    return base + (np.where(alone, taus, 0) * factors[:, None]).sum(0) + mean


def sce(base, experts, density, scale):
    taus = exact_task_vectors(base, experts)
    taus = taus * (trim(taus.var(0), density) > 0)
    squares = np.square(taus).sum(1)
    shares = (squares / squares.sum())[:, None]
    agreeing = (np.sign(taus) == np.sign(taus.sum(0))) & (taus != 0)
    total = (agreeing * shares).sum(0)
    return base + scale * (agreeing * shares * taus).sum(0) / np.where(total == 0, 1, total)


def emr(base, experts, weights):
    taus = exact_task_vectors(base, experts)
    sign = np.sign(taus.sum(0))
    agreeing = np.sign(taus) == sign
    unified = sign * np.where(agreeing, np.abs(taus), 0).max(0)
    rescalers = np.abs(taus).sum(1) / np.abs(agreeing * unified).sum(1)
    models = rescalers[:, None] * agreeing * unified
    return base + np.average(models, axis=0, weights=weights)


def pcb(base, experts, density, scale):
    """As the authors' code has it, but for scores below 0; not of density 1."""
    taus = exact_task_vectors(base, experts)
    ordered = np.sort(np.abs(taus), axis=1)
    size = taus.shape[1]
    least, most = ordered[:, [int(size * 1e-4)]], ordered[:, [int(size * (1 - 1e-4) - 1)]]
    clamped = np.clip(np.abs(taus), least, most)
    scores = np.exp(len(taus) * ((clamped - least) / (most - least)) ** 2)
    scores = scores * np.tanh(taus * taus.sum(0))
    limits = np.sort(scores, axis=1)[:, [int(size * (1 - density))]]
    assert (limits > 0).all()
    shares = np.clip((scores - limits) / (scores.max(1, keepdims=True) - limits), 0, None)
    total = shares.sum(0)
    merged = (np.sign(taus) * clamped * shares).sum(0) / np.where(total > 0, total, 1)
    return base + scale * merged


def localize_and_stitch(base, experts, density, scale):
    taus = np.stack([trim(tau, density) for tau in exact_task_vectors(base, experts)])
    return base + scale * taus.sum(0) / np.maximum((taus != 0).sum(0), 1)


def gradient_matching(base, experts, fishers, base_fisher, sizes, prior, scale):
    """theta_0 + alpha sum_t H^-1 (H_0 + H_t) tau_t by inverting matrices, entry by entry one."""
    first = np.diag(np.ravel(base_fisher) + prior)
    hessians = [np.diag(size * np.ravel(f)) for size, f in zip(sizes, fishers, strict=True)]
    inverse = np.linalg.inv(first + scale * sum(hessians))
    taus = [tau.ravel() for tau in exact_task_vectors(base, experts)]
    moved = sum(inverse @ (first + h) @ tau for h, tau in zip(hessians, taus, strict=True))
    return base + scale * moved.reshape(np.shape(base))


def spherical_mean(experts, weights):
    """The weighted mean of the directions, as long as the vectors are in the mean."""
    lengths = np.linalg.norm(experts, axis=1)
    shares = np.array(weights) / np.sum(weights)
    mean = shares / lengths @ experts
    return shares @ lengths * mean / np.linalg.norm(mean)


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
