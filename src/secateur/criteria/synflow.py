"""SynFlow: synaptic flow, a score that no layer can lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SynFlow"]


@dataclass(frozen=True)
class SynFlow(Criterion):
    """|w dR/dw|, R the output for an input of ones of the network made positive; a unit scores the sum of its weights'.

    Without biases and BatchNorm, and with ReLU or no activation function, the scores of every layer that all paths
    pass sum to R. Meant for rounds (`prune_in_rounds`) with scope `"global"`.

    Cost: the shape of one batch; one forward and backward pass for one sample, in float64.

    Differs from the paper: nothing in the score. One call scores once; the paper scores in 100 rounds.

    Reference: Tanaka et al. 2020, equation 2 and algorithm 1.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"synaptic_flow"})
    summary: ClassVar[str] = "|w dR/dw| of the network made positive"
    paper: ClassVar[str] = "Tanaka et al. 2020"
    cost: ClassVar[str] = "one sample, forward and backward"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.synaptic_flow is not None
        return evidence.synaptic_flow
