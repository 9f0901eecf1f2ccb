"""Each method in float64 numpy, written from its paper and independent of the library.

Every entry of `REFERENCES` has the signature ``name(grads, losses, present, **hyper) -> updates`` with grads (T, K, P):
T successive steps, losses (T, K), present (T, K) bool, updates (T, P). A step sees only the rows of the present tasks;
a method with state keeps it per task, so the state of absent tasks does not change. No task present: a zero update.
Random methods whose draws no argument fixes have their law here instead: what may come out, with which probability.

G holds the task gradients as rows, L the losses, n the row norms, g0 the mean row, d the update, w the weights.
"""

from reference import buffers as buffers
from reference import mixed as mixed
from reference import two_batches as two_batches
from reference.common import REFERENCES as REFERENCES
from reference.common import min_norm as min_norm
from reference.common import simplex as simplex
from reference.common import unit as unit
from reference.coordinates import graddrop_law as graddrop_law
from reference.gramian import pcgrad_outcomes as pcgrad_outcomes
from reference.losses import relobralo as relobralo
from reference.losses import slaw as slaw
from reference.losses import softadapt as softadapt
from reference.wrappers import smoothed as smoothed
