"""The state of rows that a decode step's end updates, and the report that the host reads later."""

from typing import NamedTuple

from jaxtyping import Bool, Float64, Int
from torch import Tensor

# Rows of `report`. Ids are exact in float64, and one tensor is one copy to the host.
TOKEN, LARGEST_LOGIT, LOGPROB = range(3)

NO_TOKEN = -1  # reported for a row that did not run, and in unused places of `stop`


class TokenRows(NamedTuple):
    """The rows of one step, one entry for each."""

    token: Int[Tensor, "b"]  # the newest token
    lengths: Int[Tensor, "b"]  # tokens in the cache
    made: Int[Tensor, "b"]  # new tokens so far
    limit: Int[Tensor, "b"]  # new tokens at most
    running: Bool[Tensor, "b"]
    stop: Int[Tensor, "b n"]  # ids that end the row, and NO_TOKEN in unused places
    report: Float64[Tensor, "steps 3 b"]
    # The entry of `report` that the step writes, the same for all rows. Each row counts for itself,
    # so that the programs of a kernel do not race.
    cursor: Int[Tensor, "b"]
