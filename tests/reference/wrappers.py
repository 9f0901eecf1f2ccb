"""Wrappers."""

import numpy as np


def smoothed(weights, present, decay, init=np.nan):
    """Zhou et al. 2022 (CR-MOGM) on weights (T, K): λ_i <- decay λ_i + (1-decay) w_i, from task i's first weight on."""
    state, used = np.zeros(weights.shape[1]) + init, []
    for w, p in zip(weights, present, strict=True):
        state[p] = np.where(np.isnan(state[p]), w[p], decay * state[p] + (1 - decay) * w[p])
        used.append(np.where(p, state, 0))
    return np.array(used)
