"""Text generation."""

from jaxspeed.serve.generate import complete as complete
from jaxspeed.serve.generate import generate as generate
from jaxspeed.serve.sampling import Sampling as Sampling
from jaxspeed.serve.sampling import sample as sample
