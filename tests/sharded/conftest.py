"""These tests need eight devices, a number set when JAX starts; see the Makefile."""

import jax

collect_ignore_glob = ["test_*.py"] if jax.device_count() < 8 else []
