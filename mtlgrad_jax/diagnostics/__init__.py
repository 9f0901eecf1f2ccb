from mtlgrad_jax.diagnostics.fronts import hypervolume as hypervolume
from mtlgrad_jax.diagnostics.fronts import plot_front as plot_front
from mtlgrad_jax.diagnostics.fronts import simplex_lattice as simplex_lattice
from mtlgrad_jax.diagnostics.plots import plot_conflicts as plot_conflicts
from mtlgrad_jax.diagnostics.plots import plot_cosines as plot_cosines
from mtlgrad_jax.diagnostics.plots import plot_weights as plot_weights
from mtlgrad_jax.diagnostics.states import metrics as metrics
from mtlgrad_jax.diagnostics.states import scalars as scalars
