"""Methods that look at every coordinate."""

import numpy as np

from reference.common import stateless


@stateless
def trimmed_mean(G, L, trim=1):
    """Yin et al. 2018, Definition 2: each coordinate's mean without its `trim` smallest and largest entries."""
    return (np.sort(G, axis=0)[trim:-trim] if trim and len(G) >= 2 * trim + 1 else G).mean(axis=0)


@stateless
def coordinate_median(G, L):
    """Yin et al. 2018, Definition 1."""
    return np.median(G, axis=0)


@stateless
def sign_agreement(G, L, threshold=1.0, rescale=False):
    """Parascandolo et al. 2020: the mean where |mean_i sign g_ij| >= τ; the official code may divide by its share."""
    agreed = np.abs(np.sign(G).sum(axis=0)) >= np.round(threshold * len(G), 9)
    layers = [slice(0, 1), slice(1, None)]  # the leaves of the harness
    share = np.concatenate([np.full(agreed[leaf].size, agreed[leaf].mean()) for leaf in layers])
    return np.where(agreed, G.mean(axis=0), 0) / np.where(rescale & agreed, share, 1)


def graddrop_law(G, leak=0.0):
    """Chen et al. 2020, lines 10-15: each coordinate's two values (P,), and the probability of the first."""
    leak = np.broadcast_to(leak, len(G))[:, None]
    size = np.abs(G).sum(axis=0)
    purity = (1 + np.divide(G.sum(axis=0), size, out=np.zeros_like(size), where=size > 0)) / 2
    up, down = (((leak + (1 - leak) * kept) * G).sum(axis=0) for kept in (G > 0, G < 0))
    return up, down, purity
