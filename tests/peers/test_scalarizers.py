"""Loss weightings beside TorchJD's scalarizers: its derivatives by the losses are our weights, in float64."""

import jax
import numpy as np
import pytest
from peerlib import COMING_FROM, against, weigh

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS

torch = pytest.importorskip("torch", reason="parity needs the extra 'peers'")
scalarization = pytest.importorskip("torchjd.scalarization", reason="parity needs the extra 'peers'")

K, STEPS = 4, 6
LOSSES = np.random.default_rng(0).uniform(0.1, 3.0, size=(STEPS, K))
SCALES = [1e-3, 1.0, 1e3]
PREFERENCE, IDEAL = (0.1, 0.2, 0.3, 0.4), (0.05, 0.0, -1.0, 0.1)


def tensor(values):
    return torch.tensor(np.asarray(values, float), dtype=torch.float64)


def derivatives(scalarize, losses):
    values = tensor(losses).requires_grad_()
    return torch.autograd.grad(scalarize(values), values)[0].numpy()


def ours(name, losses, **kwargs):
    return weigh(name, np.broadcast_to(np.eye(K), (len(losses), K, K)), losses, **kwargs)[0]


COVERED = {
    "Constant": "constant",
    "COSMOS": "cosmos",
    "DWA": "dwa",
    "FAMO": "famo",
    "GeometricMean": "gls",
    "IMTLL": "imtl_l",
    "Mean": "mean",
    "PBI": "pbi",
    "Random": "rlw",
    "STCH": "stch",
    "Sum": "sum",
    "UW": "uw",
}
"""Their scalarizers, and ours, which the tests here compare."""
agree = against("TorchJD", COVERED)


def test_every_scalarizer_has_a_counterpart():
    """A new release of TorchJD fails here until its new scalarizers are compared."""
    assert set(scalarization.__all__) - {"Scalarizer"} == set(COVERED)
    for name, ours in COVERED.items():
        assert ours in ROWS
        assert f"\n| `{name}` | `{ours}` |" in COMING_FROM.read_text()


STATELESS = {
    "mean": ({}, lambda: scalarization.Mean()),
    "sum": ({}, lambda: scalarization.Sum()),
    "constant": ({"weights": PREFERENCE}, lambda: scalarization.Constant(tensor(PREFERENCE))),
    "gls": ({}, lambda: scalarization.GeometricMean()),
    "stch": ({"mu": 0.3}, lambda: scalarization.STCH(0.3)),
    "stch, weighted": (
        {"mu": 0.1, "weights": PREFERENCE, "ideal": IDEAL},
        lambda: scalarization.STCH(0.1, tensor(PREFERENCE), tensor(IDEAL)),
    ),
    "cosmos": ({"lam": 2.0, "preference": PREFERENCE}, lambda: scalarization.COSMOS(2.0, tensor(PREFERENCE))),
    "pbi": (
        {"preference": PREFERENCE, "theta": 3.0, "ideal": IDEAL},
        lambda: scalarization.PBI(3.0, tensor(PREFERENCE), tensor(IDEAL)),
    ),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STATELESS)
def test_scalarizers(name, scale):
    """PBI adds 1e-12 to a squared distance, which shows where losses are small."""
    kwargs, make = STATELESS[name]
    losses, peer = scale * LOSSES, make()
    wanted = np.stack([derivatives(peer, row) for row in losses])
    tolerance = 1e-5 if name == "pbi" and scale < 1 else 1e-11
    agree(name.split(",")[0], ours(name.split(",")[0], losses, **kwargs), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "peer"), [("uw", "UW"), ("imtl_l", "IMTLL")])
def test_learned_scales(name, peer):
    """Their parameters are trained with torch's Adam, ours with optax's."""
    module = getattr(scalarization, peer)(K).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.025)
    wanted = []
    for losses in LOSSES:
        values = tensor(losses).requires_grad_()
        optimizer.zero_grad()
        module(values).backward()
        wanted.append(values.grad.numpy().copy())
        optimizer.step()
    agree(name, ours(name, LOSSES, num_tasks=K), wanted, rtol=1e-9)


def test_dwa():
    """Epochs of one step: theirs rolls its history by step()."""
    peer, wanted = scalarization.DWA(temperature=0.7), []
    for losses in LOSSES:
        wanted.append(derivatives(peer, losses))
        peer.step()
    agree("dwa", ours("dwa", LOSSES, num_tasks=K, temperature=0.7, window=1), wanted, rtol=1e-12)


def test_dwa_with_longer_epochs():
    peer, wanted = scalarization.DWA(), []
    for t, losses in enumerate(LOSSES, 1):
        wanted.append(derivatives(peer, losses))
        if t % 2 == 0:
            peer.step()
    agree("dwa", ours("dwa", LOSSES, num_tasks=K, window=2), wanted, rtol=1e-12)


def test_famo():
    """Theirs adds 1e-8 to the losses."""
    peer, wanted = scalarization.FAMO(K, lr=0.1, weight_decay=0.01).double(), []
    for losses, following in zip(LOSSES, [*LOSSES[1:], None], strict=True):
        wanted.append(derivatives(peer, losses))
        if following is not None:
            peer.update(tensor(following))
    agree("famo", ours("famo", LOSSES, num_tasks=K, learning_rate=0.1, gamma=0.01), wanted, rtol=1e-6)


def test_random_weights_have_the_same_law():
    """Moments of 20,000 draws: the mean 1/K, and the same second moments."""
    torch.manual_seed(0)
    count = 20_000
    peer = scalarization.Random()
    theirs = np.stack([derivatives(peer, LOSSES[0]) for _ in range(count)])
    mine = ours_many(count)
    for draws in (theirs, mine):
        np.testing.assert_allclose(draws.mean(axis=0), 1 / K, atol=0.01)
    np.testing.assert_allclose(np.cov(mine.T), np.cov(theirs.T), atol=2e-3)


def ours_many(count):
    def draw(seed):
        method = mtl.rlw(key=seed)
        return method.weigh(None, method.init(None), losses=LOSSES[0])[0]

    return np.asarray(jax.jit(jax.vmap(draw))(np.arange(count)), float)
