"""Scores of trained networks, by hand."""

import pytest

from mtlgrad_jax.diagnostics import delta_m


@pytest.mark.parametrize(
    ("values", "higher_is_better", "expected"),
    [
        ([90.0, 99.0], True, 0.0),  # 10 % worse and 10 % better
        ([90.0, 108.0], True, -5.0),  # 10 % worse and 20 % better
        ([90.0, 108.0], False, 5.0),
        ([90.0, 108.0], [True, False], 15.0),
    ],
)
def test_delta_m(values, higher_is_better, expected):
    assert delta_m(values, [100.0, 90.0], higher_is_better) == pytest.approx(expected, abs=1e-12)
    named, alone = dict(zip("ab", values, strict=True)), {"b": 90.0, "a": 100.0}
    flags = dict(zip("ab", higher_is_better, strict=True)) if isinstance(higher_is_better, list) else higher_is_better
    assert delta_m(named, alone, flags) == pytest.approx(expected, abs=1e-12)


def test_delta_m_of_negative_baselines():
    assert delta_m([-2.0], [-1.0]) == -100.0  # lower is better
    assert delta_m([-2.0], [-1.0], higher_is_better=True) == 100.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([1.0], [1.0, 2.0]), "baselines"),
        (({"a": 1.0}, {"b": 1.0}), "baselines"),
        (([1.0, 1.0], [1.0, 0.0]), "baselines"),
        (([1.0, 1.0], [1.0, float("inf")]), "baselines"),
        (([], []), "baselines"),
        (([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [True, False]), "higher_is_better"),
        (({"b": 1.0, "a": 2.0}, {"a": 1.0, "b": 1.0}, [True, False]), "higher_is_better"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"^`{name}` must"):
        delta_m(*arguments)
