"""From losses to per-task gradients: stacked, or as products with their Jacobian."""

from mtlgrad_jax.oracles.features import linearize_features as linearize_features
from mtlgrad_jax.oracles.linearize import TaskJacobian as TaskJacobian
from mtlgrad_jax.oracles.linearize import linearize as linearize
from mtlgrad_jax.oracles.ntk import ntk_traces as ntk_traces
from mtlgrad_jax.oracles.perturbed import perturbed_task_grad as perturbed_task_grad
from mtlgrad_jax.oracles.perturbed import sam_perturbation as sam_perturbation
from mtlgrad_jax.oracles.perturbed import sam_value_and_grad as sam_value_and_grad
from mtlgrad_jax.oracles.task_value_and_grad import task_value_and_grad as task_value_and_grad
