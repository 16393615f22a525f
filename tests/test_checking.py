"""That annotations are checked at all, and at each function's first calls in every test."""

import pytest
import torch
from checking import CALLS
from jaxtyping import TypeCheckError

from circuits.search.rank import worth
from relp import Component


@pytest.mark.parametrize("again", [False, True])
def test_wrong_types_are_refused(again: bool) -> None:
    with pytest.raises(TypeCheckError, match="parameters of circuits.search.rank.worth"):
        worth([1.0], "denoise", signed=again)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError, match="Component.parse"):
        Component.parse(3)  # type: ignore[arg-type]
    for _ in range(CALLS):  # the next test is checked again
        assert torch.equal(worth(torch.ones(2), "denoise", signed=again), torch.ones(2))
