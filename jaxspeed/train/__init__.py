"""Training: a model, a loss and an optimizer become an engine over the mesh."""

from jaxspeed.train.engine import Engine as Engine
from jaxspeed.train.engine import initialize as initialize
from jaxspeed.train.evaluate import HeldOut as HeldOut
from jaxspeed.train.evaluate import evaluate_model as evaluate_model
from jaxspeed.train.program import Program as Program
from jaxspeed.train.program import from_function as from_function
from jaxspeed.train.program import from_linen as from_linen
from jaxspeed.train.program import from_nnx as from_nnx
from jaxspeed.train.state import TrainState as TrainState
