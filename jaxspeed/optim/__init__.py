"""Optimizers, learning-rate schedules, and mixed precision with loss scaling."""

from jaxspeed.optim.loss_scale import LossScale as LossScale
from jaxspeed.optim.loss_scale import LossScaleState as LossScaleState
from jaxspeed.optim.optimizers import Optimizer as Optimizer
from jaxspeed.optim.optimizers import build as build
from jaxspeed.optim.optimizers import learning_rate as learning_rate
from jaxspeed.optim.precision import Precision as Precision
from jaxspeed.optim.schedules import OneCycle as OneCycle
from jaxspeed.optim.schedules import RangeTest as RangeTest
from jaxspeed.optim.schedules import Schedule as Schedule
from jaxspeed.optim.schedules import build_schedule as build_schedule
from jaxspeed.optim.schedules import momentum_schedule as momentum_schedule
