"""A pytest plugin: every call into the package is made under another default dtype, and on the default device meta.

The package must not depend on these settings of a program: it names dtype and device of its tensors. The tests' own
tensors are made outside of these calls, so that all tests run unchanged.
"""

from __future__ import annotations

import functools

import pytest
import torch

from pdl_ext import PDLLoss, TokenFrequency, corpus, functional, reference, statistics
from pdl_ext.engine import autograd, linear
from pdl_ext.weighting import Weighting

CALLS = {
    functional: ("pdl_loss", "linear_pdl_loss", "count_tokens", "token_weights"),
    reference: ("pdl_loss", "linear_pdl_loss", "count_tokens", "token_weights"),
    statistics: ("alpha_statistics", "weight_statistics", "zipf_slope", "log_spaced_ranks"),
    corpus: ("count_corpus",),
    Weighting: ("weights",),
    PDLLoss: ("__init__", "forward", "linear", "refresh", "state_dict", "load_state_dict", "_apply"),
    TokenFrequency: (
        *(
            "__init__",
            "update",
            "merge",
            "all_reduce",
            "sync",
            "save",
            "load",
            "from_counts",
            "probabilities",
            "buckets",
        ),
        *("state_dict", "load_state_dict", "_apply"),
    ),
    autograd.Loss: ("backward",),
    autograd.LossOverLogits: ("backward",),
    linear.LinearLoss: ("backward",),
}


def pytest_addoption(parser):
    parser.addoption("--default-dtype", choices=["float64", "bfloat16"], required=True)


called: set[str] = set()


def under(function, dtype):
    @functools.wraps(function)
    def call(*arguments, **options):
        called.add(function.__qualname__)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                return function(*arguments, **options)
        finally:
            torch.set_default_dtype(before)

    return call


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    dtype = getattr(torch, config.getoption("--default-dtype"))
    PDLLoss.blend = property(under(PDLLoss.blend.fget, dtype), under(PDLLoss.blend.fset, dtype))
    for owner, names in CALLS.items():
        for name in names:
            method = vars(owner).get(name)
            if isinstance(method, (classmethod, staticmethod)):
                setattr(owner, name, type(method)(under(method.__func__, dtype)))
            else:
                setattr(owner, name, under(getattr(owner, name), dtype))


def pytest_sessionfinish(session):
    expected = {getattr(owner, name).__qualname__ for owner, names in CALLS.items() for name in names}
    if missing := expected - called:
        print(f"\nnever called: {sorted(missing)}")
        session.exitstatus = 1
