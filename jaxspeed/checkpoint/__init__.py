"""Saving and restoring training state."""

from jaxspeed.checkpoint.store import Checkpoint as Checkpoint
from jaxspeed.checkpoint.store import Store as Store
from jaxspeed.checkpoint.store import open_store as open_store
from jaxspeed.checkpoint.store import restore as restore
from jaxspeed.checkpoint.store import save as save
from jaxspeed.checkpoint.store import save_async as save_async
