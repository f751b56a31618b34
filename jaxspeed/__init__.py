"""jaxspeed: the DeepSpeed family of systems, rebuilt for JAX. See README.md."""

from jaxspeed import checkpoint as checkpoint
from jaxspeed import comm as comm
from jaxspeed import config as config
from jaxspeed import data as data
from jaxspeed import models as models
from jaxspeed import optim as optim
from jaxspeed import train as train
from jaxspeed.checkpoint import Checkpoint as Checkpoint
from jaxspeed.config import Batch as Batch
from jaxspeed.config import Config as Config
from jaxspeed.config import Run as Run
from jaxspeed.data import Data as Data
from jaxspeed.mesh import MeshShape as MeshShape
from jaxspeed.mesh import make_mesh as make_mesh
from jaxspeed.optim import LossScale as LossScale
from jaxspeed.optim import Optimizer as Optimizer
from jaxspeed.optim import Precision as Precision
from jaxspeed.optim import Schedule as Schedule
from jaxspeed.parallel import Loss as Loss
from jaxspeed.parallel import Zero as Zero
from jaxspeed.parallel import gather as gather
from jaxspeed.train import Engine as Engine
from jaxspeed.train import Program as Program
from jaxspeed.train import TrainState as TrainState
from jaxspeed.train import initialize as initialize
