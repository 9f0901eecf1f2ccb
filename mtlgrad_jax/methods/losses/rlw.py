"""RLW, random loss weighting (Lin et al. 2022, arXiv 2111.10603)."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import check_choice
from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, make_key
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, softmax

Distribution = Literal["normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli"]


class RLWState(NamedTuple):
    """State of rlw."""

    key: Key


def rlw(distribution: Distribution = "normal", key: Seed = 0) -> Method:
    r"""Draw new weights in every step, with the same distribution for all tasks.

    .. math:: \sum_i w_i = 1, \qquad E[w_i] = 1/K

    Args:
      distribution: "normal" and "uniform" take the softmax of K standard normal numbers, or of K numbers uniform in
        [0, 1]; "dirichlet" is uniform on the simplex; "bernoulli" takes the mean of a random set of tasks, each
        nonempty set being equally likely; "constrained_bernoulli" takes one task.
      key: a seed or a random key, the same one on every process.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.rlw("constrained_bernoulli")
      >>> update, _ = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
      >>> sorted(update.tolist())
      [0.0, 1.0]
    """
    check_choice("distribution", distribution, get_args(Distribution))
    check_key(key)

    def kernel(*, present: Present, state: RLWState) -> tuple[Weights, RLWState]:
        following, draw = draw_key(state.key)
        return _draw(distribution, draw, present), RLWState(following)

    return from_kernel(kernel, lambda _: RLWState(make_key(key)), mean_like=True)


def _draw(distribution: str, key: Array, present: Present) -> Float[Array, " K"]:
    shape, dtype = present.shape, accumulator_dtype()
    if distribution in ("normal", "uniform"):
        numbers = getattr(jax.random, distribution)(key, shape, dtype)
        return softmax(numbers, present)
    if distribution == "dirichlet":
        parts = jnp.where(present, jax.random.exponential(key, shape, dtype), 0)
        return parts / jnp.where(jnp.any(present), jnp.sum(parts), 1)
    # The first task of a uniform nonempty set is the k-th present one with probability proportional to 2^-k; each later
    # task is in the set with probability 1/2.
    first_key, rest_key = jax.random.split(key)
    order = jnp.cumsum(present)
    half = jnp.log(2.0) if distribution == "bernoulli" else 0.0
    first = jax.random.categorical(first_key, jnp.where(present, -half * order, -jnp.inf))
    chosen = jnp.arange(len(present)) == first
    if distribution == "bernoulli":
        chosen |= present & (order > order[first]) & jax.random.bernoulli(rest_key, shape=shape)
    return chosen / jnp.sum(chosen).astype(dtype)


ROW = Row(
    rlw,
    scale="mean (weights sum to 1)",
    state="a random key",
    papers=(
        Paper(
            "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
            "Baijiong Lin, Feiyang Ye, Yu Zhang, Ivor W. Tsang",
            2022,
            journal="Transactions on Machine Learning Research",
            arxiv="2111.10603",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    checked="the laws of the published distributions; TorchJD, in law",
    randomized=True,
)
