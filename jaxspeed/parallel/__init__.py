"""Parallel strategies: one paper, one file."""

from jaxspeed.parallel.data import Loss as Loss
from jaxspeed.parallel.zero import Shard as Shard
from jaxspeed.parallel.zero import Zero as Zero
from jaxspeed.parallel.zero import gather as gather
